// The kernels of monomials.py. REAL is float or double. A row of `table` holds the DEGREE coordinates of a monomial, and
// `size`, the number of coordinates, for each that it lacks.
//
// A thread has one token, counted through the batch: x is [batch][coordinate][token]. It works on the monomials from
// blockIdx.y * slice on. Where `in_shared`, it keeps what it goes back to in shared memory, as [coordinate][thread]
// (neither bank conflicts nor barriers); a token with more coordinates than fit is left to the caches.

// So many numbers of u are asked for at once, as a thread has little else to hide the memory's latency with.
#define AHEAD (DEGREE <= 4 ? 8 : DEGREE <= 8 ? 4 : 1)

template <class Step>
__device__ __forceinline__ void write_features(
    const REAL* own, Step step, const int* __restrict__ table, REAL* __restrict__ phi, long long tokens, int size,
    long long begin, long long end)
{
    for (long long i = begin; i < end; ++i) {
        REAL product = 1;
        // From the last on, as x_c times a monomial of one degree less: the same bits as in plain code.
#pragma unroll
        for (int l = DEGREE - 1; l >= 0; --l) {
            const int c = table[i * DEGREE + l];
            if (c < size) product = own[c * step] * product;
        }
        phi[i * tokens] = product;
    }
}

// Reads d and writes r numbers a token; plain code moves some 5 r (products, two concatenations).
extern "C" __global__ void monomial_features(
    const REAL* __restrict__ x, const int* __restrict__ table, REAL* __restrict__ phi, long long all, long long tokens,
    int size, long long rank, long long slice, int in_shared)
{
    extern __shared__ REAL tile[];
    const long long token = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (token >= all) return;
    const long long batch = token / tokens, t = token % tokens;
    const long long begin = blockIdx.y * slice, end = begin + slice < rank ? begin + slice : rank;
    x += batch * size * tokens + t;
    phi += batch * rank * tokens + t;
    if (in_shared) {
        const int step = blockDim.x;
        REAL* own = tile + threadIdx.x;
        for (int c = 0; c < size; ++c) own[c * step] = x[c * tokens];
        write_features(own, step, table, phi, tokens, size, begin, end);
    } else {
        write_features(x, tokens, table, phi, tokens, size, begin, end);
    }
}

// A monomial is p_DEGREE of p_l = p_(l-1) x_(c_l), p_0 = 1. So a gradient g of p_l is p_(l-1) g of x_(c_l), and x_(c_l) g
// of p_(l-1). Monomials with the same first coordinates follow each other, and share their p_l: its gradient is summed
// up in a register and passed on when they end. That makes two products for each number of u, whatever the degree.
template <class Step>
__device__ __forceinline__ void add_gradients(
    const REAL* own, REAL* grads, Step step, const REAL* __restrict__ u, const int* __restrict__ table,
    long long tokens, int size, long long begin, long long end)
{
    int at[DEGREE] = {};        // at[l] is c_(l+1)
    REAL product[DEGREE] = {};  // p_l
    REAL grad[DEGREE] = {};     // its gradient, of the monomials so far
    const auto coordinate = [&](int c) { return c < size ? own[c * step] : REAL(1); };
    const auto pass_on = [&](int l, REAL g) {
        const int c = at[l - 1];
        grad[l - 1] += g * coordinate(c);
        if (c < size) grads[c * step] += g * product[l - 1];
    };

    product[0] = 1;
#pragma unroll
    for (int l = 0; l < DEGREE; ++l) {
        at[l] = table[begin * DEGREE + l];
        if (l + 1 < DEGREE) product[l + 1] = product[l] * coordinate(at[l]);
    }
    for (long long i = begin; i < end; i += AHEAD) {
        REAL ahead[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) ahead[k] = i + k < end ? u[(i + k) * tokens] : REAL(0);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            if (i + k >= end) break;
            const int* next = table + (i + k) * DEGREE;
            // All threads of a block are at the same monomial, so that none of these branches divides a warp.
            int same = 0;
#pragma unroll
            for (int l = 0; l < DEGREE - 1; ++l) same += same == l && next[l] == at[l];
            if (same < DEGREE - 1) {
#pragma unroll
                for (int l = DEGREE - 1; l > 0; --l) {
                    if (l > same) {
                        pass_on(l, grad[l]);
                        grad[l] = 0;
                    }
                }
#pragma unroll
                for (int l = 0; l < DEGREE - 1; ++l) {
                    if (l >= same) {
                        at[l] = next[l];
                        product[l + 1] = product[l] * coordinate(at[l]);
                    }
                }
            }
            at[DEGREE - 1] = next[DEGREE - 1];
            pass_on(DEGREE, ahead[k]);
        }
    }
#pragma unroll
    for (int l = DEGREE - 1; l > 0; --l) pass_on(l, grad[l]);
}

// Reads d + r and writes d numbers a token and slice; plain code moves some 10 r (the monomials again, their gradients,
// and products of both).
extern "C" __global__ void monomial_pullback(
    const REAL* __restrict__ x, const REAL* __restrict__ u, const int* __restrict__ table, REAL* dx, long long all,
    long long tokens, int size, long long rank, long long slice, int in_shared)
{
    extern __shared__ REAL tile[];
    const long long token = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (token >= all) return;
    const long long batch = token / tokens, t = token % tokens;
    const long long begin = blockIdx.y * slice, end = begin + slice < rank ? begin + slice : rank;
    x += batch * size * tokens + t;
    u += batch * rank * tokens + t;
    dx += blockIdx.y * all * size + batch * size * tokens + t;
    if (in_shared) {
        const int step = blockDim.x;
        REAL* own = tile + threadIdx.x;
        REAL* grads = own + size * step;
        for (int c = 0; c < size; ++c) {
            own[c * step] = x[c * tokens];
            grads[c * step] = 0;
        }
        add_gradients(own, grads, step, u, table, tokens, size, begin, end);
        for (int c = 0; c < size; ++c) dx[c * tokens] = grads[c * step];
    } else {
        for (int c = 0; c < size; ++c) dx[c * tokens] = 0;
        add_gradients(x, dx, tokens, u, table, tokens, size, begin, end);
    }
}

// Reads each slice's gradients once, in their order, and writes their sum.
extern "C" __global__ void sum_slices(
    const REAL* __restrict__ parts, REAL* __restrict__ sum, long long count, long long slices)
{
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    REAL total = parts[i];
    for (long long k = 1; k < slices; ++k) total += parts[k * count + i];
    sum[i] = total;
}
