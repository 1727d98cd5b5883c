// plain_blas.cu - cuBLAS's products as plain loops, for racecheck, which fails inside cuBLAS's own
// kernels. Loaded before cuBLAS: tests/racecheck.sh.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Matrix { // column-major; turned: element (row, column) lies at (column, row)
    void *data;
    cudaDataType_t type; // CUDA_R_32F, CUDA_R_16BF or CUDA_R_16F
    int ld;
    bool turned;
};

__device__ float get(Matrix a, int row, int column) {
    const size_t i = a.turned ? (size_t)row * a.ld + column : (size_t)column * a.ld + row;
    if (a.type == CUDA_R_32F) return ((float *)a.data)[i];
    if (a.type == CUDA_R_16BF) return __bfloat162float(((__nv_bfloat16 *)a.data)[i]);
    return __half2float(((__half *)a.data)[i]);
}

// c (m,n) = a (m,k) b (k,n) + beta c; a thread is an element.
__global__ void product(Matrix a, Matrix b, Matrix c, int m, int n, int k, float beta) {
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= (size_t)m * n) return;
    const int row = (int)(i % m), column = (int)(i / m);
    float sum = beta ? beta * get(c, row, column) : 0;
    for (int j = 0; j < k; j++) sum += get(a, row, j) * get(b, j, column);
    const size_t at = (size_t)column * c.ld + row;
    if (c.type == CUDA_R_32F) ((float *)c.data)[at] = sum;
    else if (c.type == CUDA_R_16BF) ((__nv_bfloat16 *)c.data)[at] = __float2bfloat16(sum);
    else ((__half *)c.data)[at] = __float2half(sum);
}

extern "C" cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a,
                                       cublasOperation_t op_b, int m, int n, int k,
                                       const void *alpha, const void *a, cudaDataType_t type_a,
                                       int ld_a, const void *b, cudaDataType_t type_b, int ld_b,
                                       const void *beta, void *c, cudaDataType_t type_c, int ld_c,
                                       cublasComputeType_t, cublasGemmAlgo_t) {
    cudaStream_t stream;
    cublasStatus_t status = cublasGetStream(handle, &stream);
    if (status) return status;
    if (*(const float *)alpha != 1) return CUBLAS_STATUS_NOT_SUPPORTED;
    const size_t blocks = ((size_t)m * n + 255) / 256;
    product<<<(unsigned)blocks, 256, 0, stream>>>({(void *)a, type_a, ld_a, op_a == CUBLAS_OP_T},
                                                  {(void *)b, type_b, ld_b, op_b == CUBLAS_OP_T},
                                                  {c, type_c, ld_c, false}, m, n, k,
                                                  *(const float *)beta);
    return cudaGetLastError() ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

// No product is prepared, so that all come here.
extern "C" cublasStatus_t
cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                               cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                               cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                               cublasLtMatmulHeuristicResult_t *, int *count) {
    *count = 0;
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
