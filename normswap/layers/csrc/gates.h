/* Importance weights from gate parameters (K,), and gradients back; same results as gating.py. */

static void project(const double *point, int count, double *weights) {
    double whole = 0, minimum = point[0], top = point[0], sorted[BRANCHES], total = 0, threshold = 0;
    for (int k = 0; k < count; k++) {
        whole += point[k];
        minimum = fmin(minimum, point[k]);
        top = fmax(top, point[k]);
        int at = k;
        for (; at > 0 && sorted[at - 1] < point[k]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = point[k];
    }
    for (int k = 0; k < count; k++)
        weights[k] = whole == 1 && minimum >= 0 ? point[k] : NAN;
    if ((whole == 1 && minimum >= 0) || !isfinite(whole))
        return;
    /* Adding a constant to all entries does not change the projection. With the largest entry at 0, the 1 below is not
     * lost to rounding. */
    for (int k = 0; k < count; k++) {
        total += sorted[k] - top;
        if ((k + 1) * (sorted[k] - top) > total - 1)
            threshold = (total - 1) / (k + 1);
    }
    for (int k = 0; k < count; k++)
        weights[k] = fmax(point[k] - top - threshold, 0);
}

static void apply_softmax(const double *logits, int count, double *weights) {
    double top = logits[0], total = 0;
    for (int k = 1; k < count; k++)
        top = logits[k] > top ? logits[k] : top;
    for (int k = 0; k < count; k++)
        total += weights[k] = exp(logits[k] - top);
    for (int k = 0; k < count; k++)
        weights[k] /= total;
}

/* The importance weight of each branch; 0 for a branch that is not mixed. */
static void read_gate(const Gates *gates, Table parameter, double branch_weights[BRANCHES]) {
    double values[BRANCHES] = {0}, weights[BRANCHES] = {0};
    for (int k = 0; k < gates->count; k++)
        values[k] = get(parameter, k);
    (gates->softmax ? apply_softmax : project)(values, gates->count, weights);
    for (int branch = 0; branch < BRANCHES; branch++)
        branch_weights[branch] = gates->index_of[branch] < 0 ? 0 : weights[gates->index_of[branch]];
}

/* The gradient of a gate parameter from the gradient g of the weights, which may contain an added constant. Softmax:
 * w (g - sum w g); simplex: g - mean(g). */
static void write_gate(const Gates *gates, const double *branch_weights, const double *gradient, Table out) {
    double upstream[BRANCHES], centre = 0;
    if (out.values == NULL)
        return;
    for (int branch = 0; branch < BRANCHES; branch++) {
        /* A weight of 0 ignores statistics that are not finite, so they do not reach its gradient either. */
        upstream[branch] = branch_weights[branch] == 0 && !isfinite(gradient[branch]) ? 0 : gradient[branch];
        if (gates->index_of[branch] >= 0)
            centre += upstream[branch] * (gates->softmax ? branch_weights[branch] : 1.0 / gates->count);
    }
    for (int branch = 0; branch < BRANCHES; branch++)
        if (gates->index_of[branch] >= 0)
            put(out, gates->index_of[branch],
                (upstream[branch] - centre) * (gates->softmax ? branch_weights[branch] : 1));
}
