// The kernels of tiles.py. REAL is float or double.
//
// `rows` rows of `keys` numbers follow each other; a row belongs to blockDim.x threads, a warp or more, and a block has
// blockDim.y of them (more than one only of a warp each).

// So many numbers of its row a thread keeps in registers; a longer row is read twice.
#define HELD 8

#define MINUS_INFINITY ((REAL)__int_as_float(0xff800000))

__device__ __forceinline__ long long own_row() { return blockIdx.x * (long long)blockDim.y + threadIdx.y; }

// What a row adds to its scores, and which keys it sees.
struct Seen {
    const REAL* bias;
    long long first, last;

    __device__ __forceinline__ Seen(
        long long row, long long rows, long long blocks, long long keys, const REAL* bias, const int* first,
        const int* last)
        : bias(bias ? bias + row / rows * keys : bias),
          first(first ? first[row % (blocks * rows)] : 0),
          last(last ? last[row % (blocks * rows)] : keys)
    {
    }

    __device__ __forceinline__ REAL exponent(REAL score, long long k) const
    {
        if (k < first || k >= last) return MINUS_INFINITY;
        // What a removed key holds may have overflowed in its scores.
        if (bias && bias[k] == MINUS_INFINITY) return MINUS_INFINITY;
        return bias ? score + bias[k] : score;
    }
};

// NaN wins, whichever it is; fmax would lose it.
struct Greater {
    __device__ __forceinline__ REAL operator()(REAL a, REAL b) const { return a > b || a != a ? a : b; }
};

struct Sum {
    __device__ __forceinline__ REAL operator()(REAL a, REAL b) const { return a + b; }
};

// Over the threads of a row, in an order that blockDim.x alone decides; all of them get the same bits.
template <class Operation>
__device__ __forceinline__ REAL reduce(REAL value, Operation operation)
{
    extern __shared__ REAL tile[];
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    if (blockDim.x == 32) return value;
    __syncthreads();  // until an earlier reduction has been read
    if (threadIdx.x % 32 == 0) tile[threadIdx.x / 32] = value;
    __syncthreads();
    value = tile[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = operation(value, tile[warp]);
    return value;
}

// Reads and writes each score once (reads those of long rows twice, mostly from caches); plain code moves some 10
// numbers a score: bias, mask, maximum, difference, exponential, sum.
extern "C" __global__ void __launch_bounds__(1024) exponentials(
    REAL* s, const REAL* __restrict__ least, const REAL* __restrict__ bias, const int* __restrict__ first,
    const int* __restrict__ last, REAL* __restrict__ most, REAL* __restrict__ sums, long long all, long long blocks,
    long long rows, long long keys)
{
    const long long row = own_row();
    if (row >= all) return;  // a whole warp, with no barrier ahead
    const Seen seen(row, rows, blocks, keys, bias, first, last);
    const int threads = blockDim.x;
    s += row * keys;

    REAL held[HELD];
    REAL greatest = least[row];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const long long k = threadIdx.x + i * threads;
        held[i] = k < keys ? seen.exponent(s[k], k) : MINUS_INFINITY;
        greatest = Greater()(greatest, held[i]);
    }
    for (long long k = threadIdx.x + HELD * threads; k < keys; k += threads)
        greatest = Greater()(greatest, seen.exponent(s[k], k));
    greatest = reduce(greatest, Greater());
    if (greatest == MINUS_INFINITY) greatest = 0;

    REAL sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const long long k = threadIdx.x + i * threads;
        if (k < keys) {
            const REAL weight = exp(held[i] - greatest);
            s[k] = weight;
            sum += weight;
        }
    }
    for (long long k = threadIdx.x + HELD * threads; k < keys; k += threads) {
        const REAL weight = exp(seen.exponent(s[k], k) - greatest);
        s[k] = weight;
        sum += weight;
    }
    sum = reduce(sum, Sum());
    if (threadIdx.x == 0) {
        most[row] = greatest;
        sums[row] = sum;
    }
}

// Reads two and writes two numbers an entry; plain code moves some 15: bias, mask, difference, exponential, products.
extern "C" __global__ void score_gradients(
    REAL* __restrict__ s, REAL* __restrict__ e, const REAL* __restrict__ most, const REAL* __restrict__ scale,
    const REAL* __restrict__ delta, const REAL* __restrict__ bias, const int* __restrict__ first,
    const int* __restrict__ last, long long all, long long blocks, long long rows, long long keys)
{
    const long long row = own_row();
    if (row >= all) return;
    const Seen seen(row, rows, blocks, keys, bias, first, last);
    const REAL row_most = most[row], row_scale = scale[row], row_delta = delta[row];
    const long long threads = (long long)gridDim.y * blockDim.x;
    s += row * keys;
    e += row * keys;
    for (long long k = blockIdx.y * blockDim.x + threadIdx.x; k < keys; k += threads) {
        const REAL f = exp(seen.exponent(s[k], k) - row_most) * row_scale;
        s[k] = f;
        e[k] = f == 0 ? REAL(0) : f * (e[k] - row_delta);  // as `times` of tiles.py
    }
}

// Reads and writes each product once; plain code moves some 10 numbers: sum, difference, comparison, choice, exponential.
extern "C" __global__ void gaussian(
    REAL* __restrict__ products, const REAL* __restrict__ offsets, const REAL* __restrict__ norms, long long all,
    long long blocks, long long rows, long long keys)
{
    const long long row = own_row();
    if (row >= all) return;
    const long long block = row / rows;  // counted through the batch
    const REAL offset = offsets[block / blocks * rows + row % rows];
    const long long threads = (long long)gridDim.y * blockDim.x;
    products += row * keys;
    norms += block * keys;
    for (long long k = blockIdx.y * blockDim.x + threadIdx.x; k < keys; k += threads) {
        const REAL exponent = products[k] + offset - norms[k];
        products[k] = exp(exponent > 0 ? REAL(0) : exponent);
    }
}
