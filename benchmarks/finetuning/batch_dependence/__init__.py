"""The effect of a penalty on batch dependence, an ablation of `bn_statistics="batch"`."""
