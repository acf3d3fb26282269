/* The lower bound for decoding an `evermind-lm` on one thread: the same maths in fp32, no
 * runtime around it. Compiled on the spot by sides.py; formulas as in the family's exporter.
 *
 * `weights` are pointers in the order of the family's canonical tensors: embedding, and per
 * layer conv (d, C), norm_conv, norm_moe, router (E, d), then w1 (h, d), b1, w2 (d, h), b2 of
 * the shared expert and of every routed one.
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int vocab, width, layers, kernel, hidden, experts, top_k;
} Dims;

/* y = W x + b for W (rows, columns); four rows at a time keep the multipliers busy. */
static void linear(float *y, const float *w, const float *b, const float *x, int rows, int columns)
{
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *w0 = w + (size_t)r * columns, *w1 = w0 + columns;
        const float *w2 = w1 + columns, *w3 = w2 + columns;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int c = 0; c < columns; c++) {
            s0 += w0[c] * x[c];
            s1 += w1[c] * x[c];
            s2 += w2[c] * x[c];
            s3 += w3[c] * x[c];
        }
        y[r] = s0, y[r + 1] = s1, y[r + 2] = s2, y[r + 3] = s3;
    }
    for (; r < rows; r++) {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int c = 0; c < columns; c++)
            s += w[(size_t)r * columns + c] * x[c];
        y[r] = s;
    }
    if (b)
        for (r = 0; r < rows; r++)
            y[r] += b[r];
}

static void rms_norm(float *y, const float *x, const float *gain, int width)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < width; i++)
        sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / width + 1e-5f);
    for (int i = 0; i < width; i++)
        y[i] = x[i] * scale * gain[i];
}

/* out += gate * W2 relu(W1 x + b1) + b2 for the weights at `ffn` (w1, b1, w2, b2). */
static void add_expert(float *out, const float **ffn, const float *x, float gate, float *up,
                       float *down, const Dims *d)
{
    linear(up, ffn[0], ffn[1], x, d->hidden, d->width);
    for (int i = 0; i < d->hidden; i++)
        up[i] = up[i] > 0 ? up[i] : 0;
    linear(down, ffn[2], ffn[3], up, d->width, d->hidden);
    for (int i = 0; i < d->width; i++)
        out[i] += gate * down[i];
}

/* Logits are summed in double and judged in float, lowest index first, as the peer does. */
static void route(int *ids, float *gates, const float *router, const float *x, float *scores,
                  const Dims *d)
{
    for (int e = 0; e < d->experts; e++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < d->width; i++)
            sum += (double)router[(size_t)e * d->width + i] * x[i];
        scores[e] = (float)sum;
    }
    float total = 0, first = 0;
    for (int k = 0; k < d->top_k; k++) {
        int best = 0;
        for (int e = 1; e < d->experts; e++)
            if (scores[e] > scores[best])
                best = e;
        if (k == 0)
            first = scores[best];
        ids[k] = best;
        gates[k] = expf(scores[best] - first);
        total += gates[k];
        scores[best] = -INFINITY;
    }
    for (int k = 0; k < d->top_k; k++)
        gates[k] /= total;
}

/* Decode `count` tokens from an empty state; `logits` (count, V) may be NULL. Returns the sum
 * of the most likely next tokens, so that nothing can be left out. */
long decode(const float **weights, const Dims *dims, const int *tokens, int count, float *logits)
{
    Dims d = *dims;
    int window = d.kernel - 1, per_layer = 4 + 4 * (1 + d.experts);
    float *state = calloc((size_t)d.layers * (window + 1) * d.width, sizeof(float));
    float *x = malloc(sizeof(float) * d.width), *n = malloc(sizeof(float) * d.width);
    float *sum = malloc(sizeof(float) * d.width), *down = malloc(sizeof(float) * d.width);
    float *up = malloc(sizeof(float) * d.hidden), *scores = malloc(sizeof(float) * d.experts);
    float *gates = malloc(sizeof(float) * d.top_k), *scratch = malloc(sizeof(float) * d.vocab);
    int *ids = malloc(sizeof(int) * d.top_k);
    long chosen = 0;
    for (int t = 0; t < count; t++) {
        memcpy(x, weights[0] + (size_t)tokens[t] * d.width, sizeof(float) * d.width);
        for (int l = 0; l < d.layers; l++) {
            const float **w = weights + 1 + l * per_layer;
            float *past = state + (size_t)l * (window + 1) * d.width; /* oldest first */
            rms_norm(n, x, w[1], d.width);
            memcpy(past + (size_t)window * d.width, n, sizeof(float) * d.width);
            for (int i = 0; i < d.width; i++) {
                float y = 0;
                for (int j = 0; j < d.kernel; j++) /* tap j is the lag */
                    y += w[0][(size_t)i * d.kernel + j] * past[(size_t)(window - j) * d.width + i];
                x[i] += y;
            }
            memmove(past, past + d.width, sizeof(float) * window * d.width);
            rms_norm(n, x, w[2], d.width);
            route(ids, gates, w[3], n, scores, &d);
            memset(sum, 0, sizeof(float) * d.width);
            add_expert(sum, w + 4, n, 1.0f, up, down, &d);
            for (int k = 0; k < d.top_k; k++)
                add_expert(sum, w + 8 + 4 * ids[k], n, gates[k], up, down, &d);
            for (int i = 0; i < d.width; i++)
                x[i] += sum[i];
        }
        float *out = logits ? logits + (size_t)t * d.vocab : scratch;
        linear(out, weights[0], NULL, x, d.vocab, d.width);
        int best = 0;
        for (int v = 1; v < d.vocab; v++)
            if (out[v] > out[best])
                best = v;
        chosen += best;
    }
    free(state), free(x), free(n), free(sum), free(down), free(up), free(scores), free(gates);
    free(scratch), free(ids);
    return chosen;
}
