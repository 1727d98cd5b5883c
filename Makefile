# mamba.c: `make` builds ./mamba with what this machine has; `make help` lists the rest.
# Any C11 compiler will do: `cc -O2 mamba.c -lm` is a complete build, without threads.

CC       ?= cc
CFLAGS   ?= -O3
WARNINGS  = -Wall -Wextra
# -ffp-contract=fast lets a*b+c be one fused instruction, -fno-math-errno a square root. -ffast-math stays out: with it a
# NaN passes every check.
FLAGS     = -std=gnu11 $(CFLAGS) $(WARNINGS) -ffp-contract=fast -fno-math-errno $(ARCH) $(OPENMP)
# The files that mamba.c includes lie beside it and in folders.
FOLDERS   = $(wildcard cpu files cli)
SOURCES   = mamba.c tokenizer.c $(wildcard $(FOLDERS:=/*))

# try FLAGS: the flags if a program that includes <HEADER> compiles and links with them, else nothing
try = $(shell printf '\043include <$(2)>\nint main(void) { return 0; }\n' | \
        $(CC) $(1) -Werror -x c - -o /dev/null >/dev/null 2>&1 && echo '$(1)')

# The processor's own instructions; `make portable`, or ARCH= on the command line, leaves them out.
ARCH   := $(call try,-march=native,stdio.h)
ifeq ($(ARCH),)
ARCH   := $(call try,-mcpu=native,stdio.h)
endif
# Threads; OPENMP= on the command line builds without.
OPENMP := $(call try,-fopenmp,omp.h)
ifeq ($(OPENMP),)
OPENMP := $(call try,-Xpreprocessor -fopenmp -lomp,omp.h)
endif

# Without OpenMP its pragmas mean nothing, which is as it should be.
ifeq ($(OPENMP),)
WARNINGS += -Wno-unknown-pragmas
endif

.PHONY: all cuda test-cuda run test test-all test-export debug portable bench clean help findings

all: findings mamba          ## build ./mamba

findings:
	@echo "compiler     $(CC)"
	@echo "processor    $(if $(ARCH),$(ARCH),any (no processor-specific instructions))"
	@echo "threads      $(if $(OPENMP),$(OPENMP),none: no OpenMP found)"
	@echo "GPU          $(if $(CUDA),mamba_cuda.cu for $(CUDA_ARCH),not in this build (make cuda))"

# The GPU backend, CUDA=1 (`make cuda`): mamba_cuda.cu by nvcc, for this machine's GPU or CUDA_ARCH=sm_80, sm_90 ... sm_90 is built
# as sm_90a, which alone has wgmma: steps of several sequences are up to twice as fast by it.
NVCC ?= nvcc
ifneq ($(CUDA),)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC) 2>/dev/null)))
ifeq ($(CUDA_HOME),)
$(error no nvcc found: the GPU backend needs the CUDA toolkit; plain `make` builds without)
endif
CUDA_ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/sm_\1\2/p')
ifeq ($(CUDA_ARCH),)
$(error no GPU found to build for: name one, for example `make cuda CUDA_ARCH=sm_90`)
endif
GPU_OBJECT = mamba_cuda.o
GPU_FLAGS  = -DMAMBA_CUDA
GPU_LIBS   = $(GPU_OBJECT) -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublasLt -lcublas -lcudart -lstdc++
endif

# .flags changes whenever the compiler or a flag does, so that `make portable` after `make` rebuilds.
.flags: FORCE
	@echo '$(CC) $(FLAGS) $(GPU_FLAGS) $(CUDA_ARCH)' | cmp -s - $@ || echo '$(CC) $(FLAGS) $(GPU_FLAGS) $(CUDA_ARCH)' > $@
FORCE:

mamba: $(SOURCES) .flags $(GPU_OBJECT)
	$(CC) $(FLAGS) $(GPU_FLAGS) mamba.c -o $@ $(GPU_LIBS) -lm

tests/test_all: test_all.c $(wildcard tests/*.h) $(SOURCES) .flags $(GPU_OBJECT)
	$(CC) $(FLAGS) $(GPU_FLAGS) test_all.c -o $@ $(GPU_LIBS) -lm

mamba_cuda.o: mamba_cuda.cu mamba.c .flags
	$(NVCC) -O3 -std=c++17 -arch=$(CUDA_ARCH:sm_90=sm_90a) -Xcompiler -Wall,-Wextra $(NVCCFLAGS) -c mamba_cuda.cu -o $@

cuda:                        ## build ./mamba with the GPU backend; needs nvcc, CUDA_ARCH=sm_90 ... without a GPU
	$(MAKE) all CUDA=1

test-cuda:                   ## the GPU against the CPU: kernels, logits, gradients, training, generation; needs a GPU
	$(MAKE) all tests/test_all CUDA=1
	./tests/test_all cuda

run: all                     ## build, then let the model in the repository tell a story
	./mamba models/story.bin "Once upon a time" -n 200 -s 1

# A team of threads that sleeps at barriers instead of spinning: slower alone, but tests also run beside other work.
test test-all: export OMP_WAIT_POLICY = passive

test: all tests/test_all     ## a fixed sample of every test, under 2 minutes
	./tests/test_all
	sh tests/test_cli.sh ./mamba
	sh tests/test_train.sh ./mamba

test-all: all tests/test_all debug ## everything, the damaged files under the sanitizers too; some minutes
	./tests/test_all all
	sh tests/test_cli.sh ./mamba all
	sh tests/test_train.sh ./mamba all
	./tests/test_all-debug
	./tests/test_all-debug all loader
	./tests/test_all-debug all state

PYTHON ?= python3
test-export: all             ## tests of export.py and of the tokenizer against the libraries, in PYTHON
	$(PYTHON) tests/test_export.py
	$(PYTHON) tests/test_tokenizer.py --command ./mamba

SANITIZE = -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
debug: $(SOURCES) test_all.c $(wildcard tests/*.h) ## mamba-debug and tests/test_all-debug, with address and undefined sanitizers
	$(CC) $(FLAGS) $(SANITIZE) mamba.c -o mamba-debug -lm
	$(CC) $(FLAGS) $(SANITIZE) test_all.c -o tests/test_all-debug -lm

portable:                    ## ./mamba for any processor of this kind: no -march=native
	$(MAKE) ARCH= all

bench: all                   ## one table of speeds on random weights; LLAMA_BENCH=path/to/llama-bench compares, BENCH=options of dev/bench.py
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && cp -r Makefile mamba.c tokenizer.c $(FOLDERS) "$$dir" && \
	$(MAKE) -s -C "$$dir" ARCH= mamba && $(PYTHON) dev/bench.py --portable "$$dir/mamba" $(BENCH)

clean:                       ## remove what was built
	rm -f mamba mamba-debug mamba_cuda.o tests/test_all tests/test_all-debug .flags

help:                        ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */make \1\t/' | expand -t 20
