// products.cuh - matrix products by cuBLAS. Included by mamba_cuda.cu.
//
// Our matrices are row-major. cuBLAS, which is column-major, sees them transposed, so the outputs
// come first. float: plain float32 multiply-adds. bf16, f16: tensor cores, summed in float32.

template <class T> static cudaDataType_t blas_type() {
    return sizeof(T) == 4 ? CUDA_R_32F : std::is_same<T, bf16>::value ? CUDA_R_16BF : CUDA_R_16F;
}

enum { LONG_ROWS = 8192 };  // rows from which on the algorithm is chosen
enum { PRODUCTS_MAX = 64 }; // prepared products that are kept

// The product of this shape, prepared when it is met first. The algorithm depends on shape and
// machine alone, so that runs agree to the bit: the first that cuBLAS proposes, or for many rows in
// bf16 times a small matrix that is not too deep the first whose tile is 128 x 128, else 128 x 160.
// That is up to 30% faster for in_proj, out_proj and out_proj's gradient of 130M and 370M. For the
// gradient of the head's weights it is the first of 256 x 128, else of 128 x 256, up to 7% faster
// (doc/SPEED.md).
static Product *product_of(Device *d, const ProductShape &s, cudaDataType_t in,
                           cudaDataType_t out) {
    if (d->products && d->products->size() >= PRODUCTS_MAX) products_free(d);
    if (!d->products) d->products = new std::vector<Product>();
    for (Product &p : *d->products) {
        const ProductShape &q = p.shape;
        if (q.op_a == s.op_a && q.op_b == s.op_b && p.in == in && p.out == out && q.m == s.m &&
            q.n == s.n && q.k == s.k && q.ld_a == s.ld_a && q.ld_b == s.ld_b && q.ld_c == s.ld_c)
            return &p;
    }
    d->products->push_back({});
    Product *p = &d->products->back();
    p->shape = s, p->in = in, p->out = out;
    cublasLtMatmulPreference_t limits = NULL;
    cublasLtMatmulHeuristicResult_t found[8] = {};
    size_t workspace = CUBLAS_WORKSPACE;
    uint32_t alignment = 16; // of a weight within the arena
    int count = 0, best = 0, flip_a = s.op_a == CUBLAS_OP_T, flip_b = s.op_b == CUBLAS_OP_T;
    p->ready =
        !cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) &&
        !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &s.op_a,
                                        sizeof s.op_a) &&
        !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &s.op_b,
                                        sizeof s.op_b) &&
        !cublasLtMatrixLayoutCreate(&p->a, p->in, (uint64_t)(flip_a ? s.k : s.m),
                                    (uint64_t)(flip_a ? s.m : s.k), (int64_t)s.ld_a) &&
        !cublasLtMatrixLayoutCreate(&p->b, p->in, (uint64_t)(flip_b ? s.n : s.k),
                                    (uint64_t)(flip_b ? s.k : s.n), (int64_t)s.ld_b) &&
        !cublasLtMatrixLayoutCreate(&p->c, p->out, (uint64_t)s.m, (uint64_t)s.n, (int64_t)s.ld_c) &&
        !cublasLtMatmulPreferenceCreate(&limits) &&
        !cublasLtMatmulPreferenceSetAttribute(limits, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &workspace, sizeof workspace);
    for (auto which :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        p->ready = p->ready && !cublasLtMatmulPreferenceSetAttribute(limits, which, &alignment,
                                                                     sizeof alignment);
    p->ready = p->ready &&
               !cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)d->blas, p->product, p->a, p->b,
                                               p->c, p->c, limits, 8, found, &count) &&
               count > 0 && found[0].state == CUBLAS_STATUS_SUCCESS;
    bool wide = s.n >= LONG_ROWS && p->in != CUDA_R_32F && !flip_b && s.m >= 512 && s.k >= 512 &&
                s.k <= 2 * s.m && (size_t)s.m * s.k <= 1 << 22;
    const bool of_head = s.n >= LONG_ROWS && p->in != CUDA_R_32F && flip_b && s.m >= 512;
    const cublasLtMatmulTile_t wanted_tiles[2][2] = {
        {CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_128x128},
        {CUBLASLT_MATMUL_TILE_128x256, CUBLASLT_MATMUL_TILE_256x128}};
    for (auto wanted : wanted_tiles[of_head])
        for (int i = count - 1; i >= 0 && (wide || of_head); i--) {
            uint32_t tile = 0;
            cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID,
                                                 &tile, sizeof tile, NULL);
            if (tile == (uint32_t)wanted && found[i].state == CUBLAS_STATUS_SUCCESS) best = i;
        }
    p->algorithm = found[best].algo;
    if (limits) cublasLtMatmulPreferenceDestroy(limits);
    return p;
}

// c = op_a(a) op_b(b), or += with add; `from`, where given, is what it is added to instead of c.
template <class T, class Out>
static void gemm(Device *d, const ProductShape &s, const T *a, const T *b, Out *c, bool add,
                 const Out *from = NULL) {
    float one = 1, beta = add ? 1.0f : 0.0f;
    if (s.m == 0 || s.n == 0) return;
    uintptr_t bases = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)from;
    if (bases % 16 == 0 && (from || (s.n >= LONG_ROWS && sizeof(T) == 2))) {
        Product *p = product_of(d, s, blas_type<T>(), blas_type<Out>());
        if (p->ready) {
            check_blas(d,
                       cublasLtMatmul((cublasLtHandle_t)d->blas, p->product, &one, a, p->a, b, p->b,
                                      &beta, from ? from : c, p->c, c, p->c, &p->algorithm,
                                      d->workspace, CUBLAS_WORKSPACE, d->stream),
                       "matrix product");
            return;
        }
    }
    if (from)
        copy_rows(d, c, s.ld_c * sizeof *c, from, s.ld_c * sizeof *c, (size_t)s.m * sizeof *c,
                  (size_t)s.n, "matrix product");
    check_blas(d,
               cublasGemmEx(d->blas, s.op_a, s.op_b, s.m, s.n, s.k, &one, a, blas_type<T>(),
                            (int)s.ld_a, b, blas_type<T>(), (int)s.ld_b, &beta, c, blas_type<Out>(),
                            (int)s.ld_c, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "matrix product");
}

// The three products of a layer y = x W^T with W (O,I).
// out (rows,O) = x (rows,I) W^T; add: += instead
template <class T, class Out>
static void matmul(Device *d, Rows<Out> out, Rows<T> x, const T *W, int rows, int O, int I,
                   bool add = false) {
    gemm(d, {CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, (size_t)I, x.ld, out.ld}, W, x.p, out.p, add);
}
// out (rows,O) = from (rows,O) + x (rows,I) W^T, rows without gaps. += would need a copy of `from`
// first, which moves 2.4 GB in a training step of 130m with 8 x 2048 tokens.
template <class T>
static void matmul_onto(Device *d, float *out, const float *from, const T *x, const T *W, int rows,
                        int O, int I) {
    gemm(d, {CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, (size_t)I, (size_t)I, (size_t)O}, W, x, out,
         true, from);
}
// d_x (rows,I) = d_out (rows,O) W; add: += instead
template <class T>
static void matmul_d_x(Device *d, Rows<T> d_x, Rows<T> d_out, const T *W, int rows, int O, int I,
                       bool add = false) {
    gemm(d, {CUBLAS_OP_N, CUBLAS_OP_N, I, rows, O, (size_t)I, d_out.ld, d_x.ld}, W, d_out.p, d_x.p,
         add);
}
// d_W (O,I) += d_out^T x, over rows
template <class T>
static void matmul_d_W(Device *d, float *d_W, Rows<T> d_out, Rows<T> x, int rows, int O, int I) {
    gemm(d, {CUBLAS_OP_N, CUBLAS_OP_T, I, O, rows, x.ld, d_out.ld, (size_t)I}, (const T *)x.p,
         (const T *)d_out.p, d_W, true);
}
