/* The table of RoPE angles. Frequencies and angles are computed in double and rounded once, so that
 * position 100,000 is as exact as position 1.
 *
 *   f_i = theta^(-2i/d), i in [0, d/2);  angle = pos * f_i
 *   linear:  f_i / factor
 *   llama3:  by the wavelength 2 pi / f_i: f_i / factor if longer than original/low, f_i if shorter
 *            than original/high, between them a blend of both by
 *            (original/wavelength - low) / (high - low)
 *   yarn:    f_i and f_i / factor blended by a ramp between the dimensions that turn beta_fast and
 *            beta_slow times over the original context (Peng et al. 2023, "YaRN", and Hugging
 *            Face's modeling_rope_utils) */
#include "cpu/step.h"

#include <math.h>

static double llama3_frequency(const struct claas_model_config *c, double f)
{
    double wavelength = 2.0 * M_PI / f;
    double low = c->rope_low_freq_factor, high = c->rope_high_freq_factor;
    double blend;

    if (wavelength < c->rope_original_context / high)
        return f;
    if (wavelength > c->rope_original_context / low)
        return f / c->rope_factor;
    blend = (c->rope_original_context / wavelength - low) / (high - low);
    return (1.0 - blend) * f / c->rope_factor + blend * f;
}

/* The (fractional) dimension whose wave turns `rotations` times over the original context. */
static double yarn_dimension(const struct claas_model_config *c, double rotations)
{
    return c->head_dim * log(c->rope_original_context / (rotations * 2.0 * M_PI)) /
           (2.0 * log(c->rope_theta));
}

static double yarn_frequency(const struct claas_model_config *c, double f, int i)
{
    double low = fmax(floor(yarn_dimension(c, c->rope_beta_fast)), 0.0);
    double high = fmin(ceil(yarn_dimension(c, c->rope_beta_slow)), c->head_dim - 1);
    double ramp;

    if (low == high)
        high += 0.001;
    ramp = fmin(fmax((i - low) / (high - low), 0.0), 1.0);
    return f / c->rope_factor * ramp + f * (1.0 - ramp);
}

static double frequency(const struct claas_model_config *c, int i)
{
    double f = pow(c->rope_theta, -2.0 * i / c->head_dim);

    switch (c->rope_kind) {
    case CLAAS_ROPE_PLAIN:
        return f;
    case CLAAS_ROPE_LINEAR:
        return f / c->rope_factor;
    case CLAAS_ROPE_LLAMA3:
        return llama3_frequency(c, f);
    case CLAAS_ROPE_YARN:
        return yarn_frequency(c, f, i);
    }
    return f;
}

struct table_task {
    const struct claas_model_config *config;
    float *out;
};

/* One column of the table: all positions of one frequency. */
static void fill_frequency(void *arg, int i)
{
    const struct table_task *task = arg;
    const struct claas_model_config *c = task->config;
    double f = frequency(c, i);
    double scale = c->rope_kind == CLAAS_ROPE_YARN ? c->rope_attention_factor : 1.0;

    for (int pos = 0; pos < c->context; pos++) {
        float *pair = task->out + ((size_t)pos * (c->head_dim / 2) + i) * 2;

        pair[0] = (float)(cos(pos * f) * scale);
        pair[1] = (float)(sin(pos * f) * scale);
    }
}

void claas_cpu_rope_table(const struct claas_model_config *config, claas_pool_t *pool, float *out)
{
    struct table_task task = {.config = config, .out = out};

    claas_pool_run(pool, config->head_dim / 2, fill_frequency, &task);
}
