# mamba.c: `make` builds ./mamba with what this machine has; `make help` lists the rest.
# Any C11 compiler will do: `cc -O2 mamba.c -lm` is a complete build, without threads.

CC       ?= cc
CFLAGS   ?= -O3
WARNINGS  = -Wall -Wextra
# -ffp-contract=fast: a*b+c may be one fused instruction. -fno-math-errno: sqrtf is one instruction.
# -ffast-math is not used: with it a NaN passes every check.
FLAGS     = -std=gnu11 $(CFLAGS) $(WARNINGS) -ffp-contract=fast -fno-math-errno $(ARCH) $(FLOATS) \
            $(OPENMP) $(WIDTH)
# The files that mamba.c includes lie beside it and in folders.
FOLDERS   = $(wildcard cpu files cli cli/linenoise)
SOURCES   = mamba.c tokenizer.c $(wildcard $(FOLDERS:=/*))
TESTS     = test_all.c $(wildcard tests/*.h)

# VL=1 on the command line: vectors of one float, as on a processor without vector instructions.
WIDTH     = $(if $(VL),-DVL=$(VL))

# $(call try,FLAGS,PROGRAM): the flags, if the compiler takes them and the program runs; else
# nothing. The program is linked to a scratch file, never to /dev/null: some compilers replace the
# file named by -o, and as root they would replace the device.
try = $(shell dir=$$(mktemp -d) && printf '$(2)' > $$dir/try.c && \
        $(CC) $(1) -Werror $$dir/try.c -o $$dir/try > $$dir/log 2>&1 && \
        { [ -n '$(CROSS)' ] || $$dir/try > $$dir/log 2>&1; } && echo '$(or $(1),yes)'; \
        rm -rf "$$dir")
ANY_PROGRAM = \043include <stdio.h>\nint main(void) { return 0; }\n
OPENMP_PROGRAM = \043include <omp.h>\n\043ifndef _OPENMP\n\043error no OpenMP\n\043endif\n\
int main(void) {\n    int threads = 0;\n\043pragma omp parallel reduction(+ : threads)\n\
    threads += omp_get_num_threads() > 0;\n    return threads < 1;\n}\n

# A cross compiler: this machine cannot run what it builds, so linking must do.
CROSS  :=
CROSS  := $(if $(call try,,$(ANY_PROGRAM)),,yes)
# The processor's own instructions; `make portable`, or ARCH= on the command line, leaves them out.
ARCH   := $(call try,-march=native,$(ANY_PROGRAM))
ifeq ($(ARCH),)
ARCH   := $(call try,-mcpu=native,$(ANY_PROGRAM))
endif
# 32-bit x86 has two floating-point units; the older one keeps sums in a wider format.
FLOAT_PROGRAM = \043include <float.h>\n\043if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16\n\
\043error wide\n\043endif\nint main(void) { return 0; }\n
FLOATS := $(if $(call try,$(ARCH),$(FLOAT_PROGRAM)),,\
             $(call try,-msse2 -mfpmath=sse,$(FLOAT_PROGRAM)))
# Threads; OPENMP= on the command line builds without.
OPENMP := $(call try,-fopenmp,$(OPENMP_PROGRAM))
ifeq ($(OPENMP),)
OPENMP := $(call try,-Xpreprocessor -fopenmp -lomp,$(OPENMP_PROGRAM))
endif
# Without OpenMP its pragmas mean nothing, as they should.
ifeq ($(OPENMP),)
WARNINGS += -Wno-unknown-pragmas
endif

.PHONY: all cuda test-cuda run test test-all test-export test-lib test-web debug plain single lib \
        install uninstall lint portable web bench dist windows fuzz clean help findings

all: findings mamba          ## build ./mamba

findings:
	@echo "compiler     $(CC)"
	@echo "processor    $(if $(ARCH),$(ARCH),any (no processor-specific instructions))"
	@echo "threads      $(if $(OPENMP),$(OPENMP),none: no OpenMP found)"
	@echo "GPU          $(if $(CUDA),mamba_cuda.cu for $(CUDA_CODE),not in this build (make cuda))"

# The GPU backend, CUDA=1 (`make cuda`): nvcc compiles mamba_cuda.cu for this machine's GPU, or for
# CUDA_ARCH=sm_80, sm_90 ..., for a list of them, or for all. sm_90 is built as sm_90a, the only
# form that has wgmma: with it, steps of several sequences are up to twice as fast.
NVCC ?= nvcc
ifneq ($(CUDA),)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC) 2>/dev/null)))
ifeq ($(CUDA_HOME),)
$(error no nvcc found: the GPU backend needs the CUDA toolkit; plain `make` builds without)
endif
CUDA_ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
               head -1 | sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/sm_\1\2/p')
ifeq ($(CUDA_ARCH),)
$(error no GPU found to build for: name one, for example `make cuda CUDA_ARCH=sm_90`)
endif
# CUDA_ARCH=all: what people have that nvcc knows, and PTX, which the driver compiles for newer
# GPUs.
CUDA_ALL   = sm_80 sm_86 sm_89 sm_90 sm_120
CUDA_LIST := $(if $(filter all,$(CUDA_ARCH)),$(filter $(shell $(NVCC) --list-gpu-code \
               2>/dev/null),$(CUDA_ALL)) compute_90,$(CUDA_ARCH))
CUDA_CODE := $(CUDA_LIST:sm_90=sm_90a)
# Code for each, and its PTX, but for all, where one PTX is enough.
CUDA_PTX   = $(if $(filter all,$(CUDA_ARCH)),,$(CUDA_CODE:sm_%=compute_%))
CUDA_GENCODE = $(foreach a,$(sort $(CUDA_CODE) $(CUDA_PTX)),\
               -gencode arch=$(a:sm_%=compute_%),code=$a)
# nvcc compiles on all cores where it can: --threads=0 --split-compile=0. -O1 is for the code of the
# processor; the GPU's is always optimised.
NVCC_CORES := $(shell $(NVCC) --help 2>/dev/null | \
                sed -nE 's/^(--threads|--split-compile) .*/\1=0/p')
GPU_OBJECT = mamba_cuda.o
GPU_FLAGS  = -DMAMBA_CUDA
GPU_LIBS   = $(GPU_OBJECT) -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 \
             -lcublasLt -lcublas -lcudart -lstdc++
# NCCL=1: several GPUs train one model, cuda/ranks.cuh. NCCL_HOME: where include/nccl.h and
# lib/libnccl.so.2 are, if not the system's.
ifneq ($(NCCL),)
NCCL_PLACES = $(if $(NCCL_HOME),$(NCCL_HOME)/include,/usr/include /usr/local/include \
                $(CUDA_HOME)/include)
ifeq ($(wildcard $(NCCL_PLACES:=/nccl.h)),)
$(error NCCL=1: no nccl.h in $(NCCL_PLACES): install libnccl-dev, or NCCL_HOME=folder names one)
endif
GPU_FLAGS += -DMAMBA_NCCL
NCCL_FLAGS = -DMAMBA_NCCL $(NCCL_HOME:%=-I%/include)
GPU_LIBS  := $(GPU_OBJECT) $(NCCL_HOME:%=-L%/lib) $(NCCL_HOME:%=-Wl,-rpath,%/lib) \
             -L$(CUDA_HOME)/lib64 -l:libnccl.so.2 $(filter-out $(GPU_OBJECT),$(GPU_LIBS)) -lpthread
endif
# The tests must know which form of the kernels the build has; the card alone does not tell.
TEST_FLAGS = -DCUDA_CODE='"$(CUDA_CODE)"'
endif

# .flags changes whenever the compiler or a flag does, so `make portable` after `make` rebuilds.
BUILD = $(CC) $(FLAGS) $(GPU_FLAGS) $(CUDA_ARCH)
.flags: FORCE
	@echo '$(BUILD)' | cmp -s - $@ || echo '$(BUILD)' > $@
FORCE:

ifeq ($(CUDA),)
mamba: $(SOURCES) .flags
	$(CC) $(FLAGS) mamba.c -o $@ -lm
else # mamba.o by itself: it is compiled while nvcc is at work
mamba: mamba.o $(GPU_OBJECT)
	$(CC) $(FLAGS) mamba.o -o $@ $(GPU_LIBS) -lm
mamba.o: $(SOURCES) .flags
	$(CC) $(FLAGS) $(GPU_FLAGS) -c mamba.c -o $@
endif

tests/test_all: $(TESTS) $(SOURCES) .flags $(GPU_OBJECT)
	$(CC) $(FLAGS) $(GPU_FLAGS) $(TEST_FLAGS) test_all.c -o $@ $(GPU_LIBS) -lm

# Several threads and processes on one GPU, for minutes: sh tests/soak_gpu.sh
tests/soak_gpu: tests/soak_gpu.c $(SOURCES) .flags $(GPU_OBJECT)
	$(CC) $(FLAGS) $(GPU_FLAGS) -pthread $< -o $@ $(GPU_LIBS) -lm

mamba_cuda.o: mamba_cuda.cu $(wildcard cuda/*) $(SOURCES) .flags
	$(NVCC) -O1 -std=c++17 $(CUDA_GENCODE) $(NVCC_CORES) -Xcompiler -Wall,-Wextra $(NCCL_FLAGS) \
	    $(NVCCFLAGS) \
	    -c mamba_cuda.cu -o $@

cuda:                        ## build ./mamba with the GPU backend; without a GPU: CUDA_ARCH=sm_90
	$(MAKE) $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j2) all CUDA=1

test-cuda:                   ## tests of the GPU against the CPU: kernels, training, generation
	$(MAKE) all tests/test_all CUDA=1
	./tests/test_all cuda

run: all                     ## build, then let the model in the repository tell a story
	./mamba models/story.bin "Once upon a time" -n 200 -s 1 -t 0.6 -p 0.9

# Threads sleep at barriers instead of spinning. This is slower, but tests also run beside other
# work.
test test-all: export OMP_WAIT_POLICY = passive

test: all lib tests/test_all ## a fixed sample of every test, under 2 minutes
	./tests/test_all
	sh tests/test_cli.sh ./mamba
	sh tests/test_help.sh ./mamba
	sh tests/test_train.sh ./mamba

test-all: all tests/test_all debug ## all tests, damaged files also under the sanitizers; minutes
	./tests/test_all all
	sh tests/test_cli.sh ./mamba all
	sh tests/test_help.sh ./mamba
	sh tests/test_train.sh ./mamba all
	sh tests/test_ranks.sh
	./tests/test_all-debug
	./tests/test_all-debug all loader
	./tests/test_all-debug all state

PYTHON ?= python3
STRINGS ?= 20000
test-export: all             ## tests of export.py, and of the tokenizer against the library
	$(PYTHON) tests/test_export.py
	$(PYTHON) tests/test_checkpoints.py
	$(PYTHON) tests/test_tokenizer.py --command ./mamba --count $(STRINGS)
	$(PYTHON) tests/test_chat.py ./mamba

SANITIZE = -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
debug: $(SOURCES) $(TESTS)   ## mamba-debug, tests/test_all-debug: address, undefined sanitizers
	$(CC) $(FLAGS) $(SANITIZE) mamba.c -o mamba-debug -lm
	$(CC) $(FLAGS) $(SANITIZE) -DSMALL test_all.c -o tests/test_all-debug -lm

plain: $(SOURCES) $(TESTS)   ## mamba-plain, tests/test_all-plain: without the fast forms in cpu/
	$(CC) $(FLAGS) -DPLAIN mamba.c -o mamba-plain -lm
	$(CC) $(FLAGS) -DPLAIN test_all.c -o tests/test_all-plain -lm

single: $(SOURCES)           ## mamba_single.c: the whole program in one file
	awk -f dev/single.awk LICENSE mamba.c > mamba_single.c
	@echo "mamba_single.c: $$(wc -l < mamba_single.c) lines; cc -O2 mamba_single.c -lm"

# Programs look for the library by this name, wherever it was when they were linked.
SONAME = $(call try,-Wl$(COMMA)-soname$(COMMA)libmamba.so,$(ANY_PROGRAM))
COMMA := ,
# Only what lib/mamba.h declares is visible in libmamba.so, and every name begins with mamba_.
lib: libmamba.a libmamba.so  ## libmamba.a, libmamba.so, for other programs: lib/mamba.h

lib/library.o: lib/library.c lib/mamba.h $(SOURCES) .flags
	$(CC) $(FLAGS) -fPIC -fvisibility=hidden -c lib/library.c -o $@
libmamba.a: lib/library.o
	rm -f $@
	$(AR) rcs $@ lib/library.o
libmamba.so: lib/library.o
	$(CC) $(FLAGS) -shared $(SONAME) lib/library.o -o $@ -lm

test-lib: all lib            ## tests of the library, with the programs of README.md
	CC='$(CC)' OPENMP='$(OPENMP)' PYTHON='$(PYTHON)' sh tests/test_library.sh

# make install PREFIX=$HOME/.local, or DESTDIR=folder of a package
PREFIX  ?= /usr/local
PLACES   = $(DESTDIR)$(PREFIX)
install: all lib             ## program, library, man page, completion, to PREFIX (/usr/local)
	mkdir -p '$(PLACES)/bin' '$(PLACES)/lib' '$(PLACES)/include' '$(PLACES)/share/man/man1' \
	    '$(PLACES)/share/bash-completion/completions'
	install -m 755 mamba '$(PLACES)/bin/mamba'
	install -m 644 libmamba.a '$(PLACES)/lib/libmamba.a'
	install -m 755 libmamba.so '$(PLACES)/lib/libmamba.so'
	install -m 644 lib/mamba.h '$(PLACES)/include/mamba.h'
	./mamba help --man > '$(PLACES)/share/man/man1/mamba.1'
	./mamba help --bash > '$(PLACES)/share/bash-completion/completions/mamba'

uninstall:                   ## remove what `make install` wrote
	rm -f '$(PLACES)/bin/mamba' '$(PLACES)/lib/libmamba.a' '$(PLACES)/lib/libmamba.so' \
	    '$(PLACES)/include/mamba.h' '$(PLACES)/share/man/man1/mamba.1' \
	    '$(PLACES)/share/bash-completion/completions/mamba'

CLANG_FORMAT ?= clang-format
LINTED = $(filter-out mamba_single.c,$(wildcard *.c *.cu \
           $(foreach d,cpu files cli lib cuda tests tests/fuzz dev web,\
           $(d)/*.c $(d)/*.h $(d)/*.cu $(d)/*.cuh)))
lint:                        ## the layout of the sources: clang-format 19.1.7, lines to 100 columns
	@$(CLANG_FORMAT) --version | grep -q ' 19\.1\.' || \
	 echo "lint: made for clang-format 19.1.7; others differ (pip install clang-format==19.1.7)" >&2
	$(CLANG_FORMAT) --dry-run -Werror $(LINTED)
	@awk 'length($$0) > 100 { print FILENAME ":" FNR ": " length($$0) " columns"; bad = 1 } \
	      END { exit bad }' $(LINTED) Makefile .ci/run dev/single.awk

EMCC ?= emcc
WEB_FLAGS = -O3 -msimd128 -fno-math-errno $(WARNINGS) -Wno-unknown-pragmas -Wno-unused-function \
            -sSTANDALONE_WASM --no-entry -sALLOW_MEMORY_GROWTH -sMAXIMUM_MEMORY=4GB
WEB_PAGE = $(addprefix web/,index.html page.css page.js worker.js)
web: web/site/mamba.wasm     ## web/site, a page that runs the models: doc/WEB.md (emscripten)
	cp $(WEB_PAGE) models/story.bin models/copying.bin web/site
	@echo "web/site is ready for any web server: python3 -m http.server -d web/site"

test-web: all web            ## web/site in a headless Chromium, against ./mamba
	$(PYTHON) tests/test_web.py

web/site/mamba.wasm: web/mamba_web.c $(SOURCES)
	mkdir -p web/site
	$(EMCC) $(WEB_FLAGS) $< -o $@

# One program for all processors of a kind: cpu/ compiled for each set of instructions, the best one
# chosen at start (cpu/levels.h). Static where that can be linked, so that it runs on any Linux.
DIST_FLAGS   = $(filter-out $(ARCH),$(FLAGS)) $(WINDOWS_FLAGS)
DIST_LEVELS  = $(if $(call try,-mavx512f,$(ANY_PROGRAM)),avx2 avx512)
LEVEL_avx2   = -mavx2 -mfma
LEVEL_avx512 = $(LEVEL_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
DIST         = $(CC) $(DIST_FLAGS) -DMAMBA_LEVELS mamba.c $(LEVELS:%=dist-%.o) -o $@
dist:                        ## mamba-dist: as fast as `make` on every processor of this kind
	$(MAKE) mamba-dist LEVELS='$(DIST_LEVELS)'
dist-%.o: $(SOURCES) .flags
	$(CC) $(DIST_FLAGS) $(LEVEL_$*) -Wno-unused-function -DMAMBA_LEVEL=$* -c mamba.c -o $@
mamba-dist: $(SOURCES) .flags $(LEVELS:%=dist-%.o)
	$(DIST) $(call try,-static $(OPENMP),$(or $(if $(OPENMP),$(OPENMP_PROGRAM)),$(ANY_PROGRAM))) -lm

# For 64-bit Windows, by mingw-w64. gcc does not align the stack there as vectors of 32 bytes need
# it; the assembler then writes moves that need no alignment. -static: no DLL of OpenMP.
MINGW ?= x86_64-w64-mingw32-gcc
windows:                     ## mamba.exe for Windows, as fast on every processor (mingw-w64)
	$(MAKE) mamba.exe CC='$(MINGW)' ARCH= LEVELS='avx2 avx512' \
	    WINDOWS_FLAGS=-Wa,-muse-unaligned-vector-move
mamba.exe: $(SOURCES) .flags $(LEVELS:%=dist-%.o)
	$(DIST) -static -Wl,--stack,8388608 -lm

# libFuzzer, with clang. What it finds new stays in tests/fuzz/corpus for the next run.
FUZZ_SECONDS ?= 60
FUZZ_CC      ?= clang
FUZZ_TARGETS  = model state checkpoint tokenizer options
FUZZ_FLAGS    = -g -O1 -std=gnu11 -Wno-unknown-pragmas -fsanitize=fuzzer,address,undefined \
                -fno-sanitize-recover=all
tests/fuzz/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/fuzz.h $(SOURCES)
	$(FUZZ_CC) $(FUZZ_FLAGS) $< -o $@ -lm
fuzz: all $(FUZZ_TARGETS:%=tests/fuzz/fuzz_%) ## damaged files and odd options: 60 s each (clang)
	$(PYTHON) tests/fuzz/seeds.py ./mamba tests/fuzz/corpus
	for t in $(FUZZ_TARGETS); do mkdir -p tests/fuzz/found/$$t && \
	 tests/fuzz/fuzz_$$t -max_total_time=$(FUZZ_SECONDS) -max_len=200000 -timeout=20 \
	  -rss_limit_mb=4096 -print_final_stats=1 -verbosity=0 -artifact_prefix=tests/fuzz/found/$$t/ \
	  tests/fuzz/corpus/$$t || exit 1; done

portable:                    ## ./mamba for any processor of this kind: no -march=native
	$(MAKE) ARCH= all

bench: all                   ## speeds on random weights; LLAMA_BENCH=path compares, BENCH=options
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	$(CC) $(subst $(ARCH),,$(FLAGS)) mamba.c -o "$$dir/mamba" -lm && \
	$(PYTHON) dev/bench.py --portable "$$dir/mamba" $(BENCH)

clean:                       ## remove what was built
	rm -f mamba mamba-debug mamba-plain mamba_single.c mamba.o mamba_cuda.o .flags \
	    mamba-dist mamba.exe dist-*.o $(FUZZ_TARGETS:%=tests/fuzz/fuzz_%) \
	    lib/library.o libmamba.a libmamba.so \
	    tests/test_all tests/test_all-debug tests/test_all-plain tests/soak_gpu
	rm -rf web/site

help:                        ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | \
	 sed -E 's/^([a-z-]+):[^#]*## */make \1\t/' | expand -t 20
	@echo "make VL=1           ... with any of these: vectors of one float, to test such builds"
	@echo "make cuda NCCL=1    ... training on several GPUs: doc/TRAINING.md"
