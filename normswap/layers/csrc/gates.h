/* Gate parameters (K,) to importance weights of `in`, `ln`, `bn`, and gradients of the ones to those of the others.
 *
 * What mixing.py does on Python's numbers, step for step.
 */
enum { IN, LN, BN, BRANCHES };

typedef struct {
    int softmax, place[BRANCHES], count; /* where the weight of a branch is, below 0 if it is not mixed; how many are */
    Table mean, var;                     /* gate parameters (K,) */
} Gates;

static void project(const double *point, int count, double *weights) {
    double whole = 0, least = point[0], top = point[0], sorted[BRANCHES], total = 0, threshold = 0;
    for (int k = 0; k < count; k++) {
        whole += point[k];
        least = fmin(least, point[k]);
        top = fmax(top, point[k]);
        int at = k;
        for (; at > 0 && sorted[at - 1] < point[k]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = point[k];
    }
    for (int k = 0; k < count; k++)
        weights[k] = whole == 1 && least >= 0 ? point[k] : NAN;
    if ((whole == 1 && least >= 0) || !isfinite(whole))
        return;
    /* A common shift changes no projection; with the largest entry at 0, no size of it can swallow the 1 below. */
    for (int k = 0; k < count; k++) {
        total += sorted[k] - top;
        if ((k + 1) * (sorted[k] - top) > total - 1)
            threshold = (total - 1) / (k + 1);
    }
    for (int k = 0; k < count; k++)
        weights[k] = fmax(point[k] - top - threshold, 0);
}

static void soften(const double *logits, int count, double *weights) {
    double top = logits[0], total = 0;
    for (int k = 1; k < count; k++)
        top = logits[k] > top ? logits[k] : top;
    for (int k = 0; k < count; k++)
        total += weights[k] = exp(logits[k] - top);
    for (int k = 0; k < count; k++)
        weights[k] /= total;
}

/* The weight of each branch; 0 of one that is not in use. */
static void read_gate(const Gates *gates, Table parameter, double shares[BRANCHES]) {
    double values[BRANCHES] = {0}, weights[BRANCHES] = {0};
    for (int k = 0; k < gates->count; k++)
        values[k] = get(parameter, k);
    (gates->softmax ? soften : project)(values, gates->count, weights);
    for (int branch = 0; branch < BRANCHES; branch++)
        shares[branch] = gates->place[branch] < 0 ? 0 : weights[gates->place[branch]];
}

/* From the gradient of the weights, up to a common shift of them. Softmax: w (g - sum w g); simplex: g - mean(g). */
static void write_gate(const Gates *gates, const double *shares, const double *gradient, Table out) {
    double upstream[BRANCHES], centre = 0;
    if (out.values == NULL)
        return;
    for (int branch = 0; branch < BRANCHES; branch++) {
        /* A weight of zero silences statistics that are not finite, and with them what they say of that weight. */
        upstream[branch] = shares[branch] == 0 && !isfinite(gradient[branch]) ? 0 : gradient[branch];
        if (gates->place[branch] >= 0)
            centre += upstream[branch] * (gates->softmax ? shares[branch] : 1.0 / gates->count);
    }
    for (int branch = 0; branch < BRANCHES; branch++)
        if (gates->place[branch] >= 0)
            put(out, gates->place[branch], (upstream[branch] - centre) * (gates->softmax ? shares[branch] : 1));
}
