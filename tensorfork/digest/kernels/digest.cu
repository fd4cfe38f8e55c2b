// The digests of pieces on NVIDIA GPUs, all three families of sums in one reading of the memory. `digest/definition.py`
// has the definition; this is the same arithmetic. `python -m tensorfork.digest.kernels.build` compiles it.
//
// A block of threads takes a piece at a time, and a few of its rows at a time: each thread adds the words of its
// columns, lanes exchange what makes up the sums of rows, and the same words are read again from the cache for the
// columns of the other width.

typedef unsigned long long u64;
typedef unsigned int u32;

constexpr u32 WIDTH = 1021, OTHER_WIDTH = 1031, THREADS = 512, BLOCKS = 2, ROWS = 8;
constexpr u32 WARPS = THREADS / 32, CHUNK = ROWS * WIDTH, LANES = 32 / ROWS;  // lanes that stand for one row
constexpr u32 COLUMNS = (WIDTH + THREADS - 1) / THREADS, OTHERS = (OTHER_WIDTH + THREADS - 1) / THREADS;  // of a thread
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15, ODD = 0xBF58476D1CE4E5B9;

struct Piece {
    u64 address;  // a multiple of 8
    u64 nbytes;   // fewer than 2^32
};

__device__ u64 mix(u64 v) {
    v ^= v >> 32;
    v *= ODD;
    return v ^ (v >> 29);
}

__device__ u64 weight(u32 index) { return mix((index + 1) * GOLDEN) | 1; }

__device__ u64 fold(u64 sum, u32 slot) {
    u64 low = (u64)(long long)(int)(u32)sum, high = (u64)(long long)(int)(u32)(sum >> 32);
    return low * weight(2 * slot) + high * weight(2 * slot + 1);
}

// N words, from word `first` on and so many apart; zeros from word `end` on, and, unless `Whole`, from the piece's
// last byte on.
template <bool Whole>
__device__ void read(u64 (&v)[ROWS], const u64 *words, u32 nbytes, u32 first, u32 apart, u32 end) {
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) v[i] = first + i * apart < end ? words[first + i * apart] : 0;
    if (Whole || nbytes % 8 == 0) return;
#pragma unroll
    for (u32 i = 0; i < ROWS; i++)
        if (first + i * apart == nbytes / 8) v[i] &= (1ull << (8 * (nbytes % 8))) - 1;
}

// Each lane's value of each of ROWS rows in; out, in the first of LANES lanes, the sum over all lanes of the row it
// stands for.
__device__ u64 across(u64 (&v)[ROWS], u32 lane) {
#pragma unroll
    for (u32 half = ROWS / 2, apart = 16; half; half /= 2, apart /= 2)
#pragma unroll
        for (u32 i = 0; i < half; i++) {
            bool upper = lane & apart;
            u64 mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
            v[i] = mine + __shfl_xor_sync(~0u, theirs, apart);
        }
#pragma unroll
    for (u32 apart = LANES / 2; apart; apart /= 2) v[0] += __shfl_xor_sync(~0u, v[0], apart);
    return v[0];
}

struct Sums {
    u64 columns[COLUMNS] = {}, others[OTHERS] = {}, folded = 0;
};

// Add ROWS rows, from row `row` on, or what there is of them. `rows` is the block's: a word for each warp and row.
template <bool Whole>
__device__ void add(const u64 *words, u32 nbytes, u32 row, Sums &sums, u64 (*rows)[ROWS]) {
    u32 t = threadIdx.x, lane = t % 32, start = row * WIDTH;
    u32 end = Whole ? start + CHUNK : min(start + CHUNK, (nbytes + 7) / 8);
    u64 v[COLUMNS][ROWS] = {};
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
        if (t + c * THREADS < WIDTH) read<Whole>(v[c], words, nbytes, start + t + c * THREADS, WIDTH, end);
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            sums.columns[c] += v[c][i];
            if (c) v[0][i] += v[c][i];
        }
    u64 row_sum = across(v[0], lane);
    if (lane % LANES == 0) rows[t / 32][lane / LANES] = row_sum;

    u32 phase = start % OTHER_WIDTH;
#pragma unroll
    for (u32 c = 0; c < OTHERS; c++) {
        u32 column = t + c * THREADS;
        if (column >= OTHER_WIDTH) break;
        u32 at = column >= phase ? column - phase : column + OTHER_WIDTH - phase;
        read<Whole>(v[0], words, nbytes, start + at, OTHER_WIDTH, end);
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) sums.others[c] += v[0][i];
    }
    __syncthreads();
    if (t < ROWS) {
        u64 sum = 0;
        for (u32 warp = 0; warp < WARPS; warp++) sum += rows[warp][t];
        sums.folded += fold(sum, WIDTH + OTHER_WIDTH + row + t);
    }
}

// Sets found[i] to the digest of each piece. `memory` is address 0: what is reached from an argument is known to be
// global memory.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void digest(const Piece *pieces, u32 count, u64 *found,
                                                                const char *memory) {
    __shared__ u64 rows[2][WARPS][ROWS], parts[WARPS];
    u32 t = threadIdx.x;
    for (u32 number = blockIdx.x; number < count; number += gridDim.x) {
        const u64 *words = reinterpret_cast<const u64 *>(memory + pieces[number].address);
        u32 nbytes = pieces[number].nbytes;
        Sums sums;
        u32 turn = 0, row = 0;
        for (; (row + ROWS) * WIDTH * 8 <= nbytes; row += ROWS) add<true>(words, nbytes, row, sums, rows[turn++ % 2]);
        if (row * WIDTH * 8 < nbytes) add<false>(words, nbytes, row, sums, rows[turn++ % 2]);

        u64 value = sums.folded;
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++)
            if (t + c * THREADS < WIDTH) value += fold(sums.columns[c], t + c * THREADS);
#pragma unroll
        for (u32 c = 0; c < OTHERS; c++)
            if (t + c * THREADS < OTHER_WIDTH) value += fold(sums.others[c], WIDTH + t + c * THREADS);
        for (u32 apart = 16; apart; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
        if (t % 32 == 0) parts[t / 32] = value;
        __syncthreads();
        if (t == 0) {
            for (u32 warp = 1; warp < WARPS; warp++) value += parts[warp];
            found[number] = value;
        }
        __syncthreads();
    }
}
