// products.cuh - matrix products by cuBLAS.
// Included by mamba_cuda.cu.

// ---------------------------------------------------------------------------------------------------------------------
// 3 Matrix products
// Row-major (rows, depth) products as cuBLAS sees them: its column-major matrices are ours
// transposed, so the outputs come first. float: plain float32 multiply-adds. bf16: tensor cores,
// summed in float32.

template <class T> static cudaDataType_t blas_type() {
    return sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF;
}

enum {
    LONG_ROWS = 8192,
    PRODUCTS_MAX = 64
}; // rows from which algorithms are chosen; products kept

// The product of this shape, prepared when it is met first. The algorithm is a matter of shape and
// machine alone, so that runs agree to the bit: the heuristic's first, or for many rows in bf16
// times a small matrix that is not too deep the first whose tile is 128 x 128, else 128 x 160: up
// to 30% faster for in_proj, out_proj and out_proj's gradient of 130M and 370M (doc/SPEED.md).
static Product *product_of(Device *d, const Product &shape) {
    if (d->products && d->products->size() >= PRODUCTS_MAX)
        products_free(d); // prompts of ever new lengths
    if (!d->products) d->products = new std::vector<Product>();
    for (Product &p : *d->products)
        if (p.op_a == shape.op_a && p.op_b == shape.op_b && p.in == shape.in &&
            p.out == shape.out && p.m == shape.m && p.n == shape.n && p.k == shape.k &&
            p.lda == shape.lda && p.ldb == shape.ldb && p.ldc == shape.ldc)
            return &p;
    d->products->push_back(shape);
    Product *p = &d->products->back();
    cublasLtMatmulPreference_t limits = NULL;
    cublasLtMatmulHeuristicResult_t found[8] = {};
    size_t workspace = CUBLAS_WORKSPACE;
    uint32_t alignment = 16; // of a weight within the arena
    int count = 0, best = 0, flip_a = p->op_a == CUBLAS_OP_T, flip_b = p->op_b == CUBLAS_OP_T;
    p->ready = !cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) &&
               !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &p->op_a,
                                               sizeof p->op_a) &&
               !cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &p->op_b,
                                               sizeof p->op_b) &&
               !cublasLtMatrixLayoutCreate(&p->a, p->in, (uint64_t)(flip_a ? p->k : p->m),
                                           (uint64_t)(flip_a ? p->m : p->k), (int64_t)p->lda) &&
               !cublasLtMatrixLayoutCreate(&p->b, p->in, (uint64_t)(flip_b ? p->n : p->k),
                                           (uint64_t)(flip_b ? p->k : p->n), (int64_t)p->ldb) &&
               !cublasLtMatrixLayoutCreate(&p->c, p->out, (uint64_t)p->m, (uint64_t)p->n,
                                           (int64_t)p->ldc) &&
               !cublasLtMatmulPreferenceCreate(&limits) &&
               !cublasLtMatmulPreferenceSetAttribute(
                   limits, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    for (auto which :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        p->ready = p->ready && !cublasLtMatmulPreferenceSetAttribute(limits, which, &alignment,
                                                                     sizeof alignment);
    p->ready = p->ready &&
               !cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)d->blas, p->product, p->a, p->b,
                                               p->c, p->c, limits, 8, found, &count) &&
               count > 0 && found[0].state == CUBLAS_STATUS_SUCCESS;
    bool wide = p->n >= LONG_ROWS && p->in == CUDA_R_16BF && !flip_b && p->m >= 512 &&
                p->k >= 512 && p->k <= 2 * p->m && (size_t)p->m * p->k <= 1 << 22;
    for (auto wanted : {CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_128x128})
        for (int i = count - 1; i >= 0 && wide; i--) {
            uint32_t tile = 0;
            cublasLtMatmulAlgoConfigGetAttribute(&found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID,
                                                 &tile, sizeof tile, NULL);
            if (tile == (uint32_t)wanted && found[i].state == CUBLAS_STATUS_SUCCESS) best = i;
        }
    p->algorithm = found[best].algo;
    if (limits) cublasLtMatmulPreferenceDestroy(limits);
    return p;
}

// c (m,n) = op_a(a) op_b(b), or += with add; `from`, where given, is what it is added to instead of
// c.
template <class T, class Out>
static void gemm(Device *d, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                 const T *a, size_t lda, const T *b, size_t ldb, Out *c, size_t ldc, bool add,
                 const Out *from = NULL) {
    float one = 1, beta = add ? 1.0f : 0.0f;
    if (m == 0 || n == 0) return;
    uintptr_t bases = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)from;
    if (bases % 16 == 0 && (from || (n >= LONG_ROWS && sizeof(T) == 2))) {
        Product shape = {};
        shape.op_a = op_a, shape.op_b = op_b, shape.in = blas_type<T>(),
        shape.out = blas_type<Out>();
        shape.m = m, shape.n = n, shape.k = k, shape.lda = lda, shape.ldb = ldb, shape.ldc = ldc;
        Product *p = product_of(d, shape);
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
        cudaMemcpy2DAsync(c, ldc * sizeof *c, from, ldc * sizeof *c, (size_t)m * sizeof *c,
                          (size_t)n, cudaMemcpyDeviceToDevice, d->stream);
    check_blas(d,
               cublasGemmEx(d->blas, op_a, op_b, m, n, k, &one, a, blas_type<T>(), (int)lda, b,
                            blas_type<T>(), (int)ldb, &beta, c, blas_type<Out>(), (int)ldc,
                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
               "matrix product");
}

// out (rows,O) = x (rows,I) W^T, W (O,I); add: += instead
template <class T, class Out>
static void matmul(Device *d, Out *out, size_t ld_out, const T *x, size_t ldx, const T *W, int rows,
                   int O, int I, bool add = false) {
    gemm(d, CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, W, (size_t)I, x, ldx, out, ld_out, add);
}
// out (rows,O) = from (rows,O) + x (rows,I) W^T, rows without gaps: the copy of `from` that +=
// would need moves 2.4 GB in a training step of 130m with 8 x 2048 tokens.
template <class T>
static void matmul_onto(Device *d, float *out, const float *from, const T *x, const T *W, int rows,
                        int O, int I) {
    gemm(d, CUBLAS_OP_T, CUBLAS_OP_N, O, rows, I, W, (size_t)I, x, (size_t)I, out, (size_t)O, true,
         from);
}
// d_x (rows,I) = d_out (rows,O) W; add: += instead
template <class T>
static void matmul_d_x(Device *d, T *d_x, size_t ldx, const T *d_out, size_t ld_out, const T *W,
                       int rows, int O, int I, bool add = false) {
    gemm(d, CUBLAS_OP_N, CUBLAS_OP_N, I, rows, O, W, (size_t)I, d_out, ld_out, d_x, ldx, add);
}
// d_W (O,I) += d_out^T x, over rows
template <class T>
static void matmul_d_W(Device *d, float *d_W, const T *d_out, size_t ld_out, const T *x, size_t ldx,
                       int rows, int O, int I) {
    gemm(d, CUBLAS_OP_N, CUBLAS_OP_T, I, O, rows, x, ldx, d_out, ld_out, d_W, (size_t)I, true);
}
