/* exp, erf and the activations on vectors. Every element is computed alike, wherever it stands. */

/* e^x within 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, Taylor's series to r^7 (its rest is 5e-9). 0 below -104, Inf above
 * 88.73, NaN stays. ln 2 is split so that n * LN2_HIGH is exact. */
B2_INLINE vf v_exp(vf x)
{
    const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    x = v_min(v_set1(90.0f), v_max(v_set1(-105.0f), x));
    vf n = v_round(v_mul(x, v_set1(1.44269504f)));
    vf r = v_fma(n, v_set1(-ln2_high), x);
    r = v_fma(n, v_set1(-ln2_low), r);
    vf p = v_set1(1.0f / 5040);
    p = v_fma(p, r, v_set1(1.0f / 720));
    p = v_fma(p, r, v_set1(1.0f / 120));
    p = v_fma(p, r, v_set1(1.0f / 24));
    p = v_fma(p, r, v_set1(1.0f / 6));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(v_mul(r, r), p, r);
    return v_ldexp(v_add(v_set1(1.0f), p), n);
}

/* erf(x) within 1.2e-7. Below 1: x + x P(x^2); above: 1 - exp(-Q(|x|)), with Q a fit of -log(erfc) on [1, 4], beyond
 * which erf is 1 in fp32. Both are minimax polynomials (Remez exchange in 40 digits; errors 1.2e-9 and 1.1e-9). */
B2_INLINE vf v_erf(vf x)
{
    vf s = v_mul(x, x);
    vf p = v_set1(7.889124432e-5f);
    p = v_fma(p, s, v_set1(-8.020842733e-4f));
    p = v_fma(p, s, v_set1(5.189535501e-3f));
    p = v_fma(p, s, v_set1(-2.685444468e-2f));
    p = v_fma(p, s, v_set1(1.128360018e-1f));
    p = v_fma(p, s, v_set1(-3.761262714e-1f));
    p = v_fma(p, s, v_set1(1.283791659e-1f));
    vf small = v_fma(p, x, x);
    vf t = v_min(v_set1(4.0f), v_abs(x));
    vf q = v_set1(-1.855726621e-4f);
    q = v_fma(q, t, v_set1(2.939593741e-3f));
    q = v_fma(q, t, v_set1(-2.180526279e-2f));
    q = v_fma(q, t, v_set1(1.030372502e-1f));
    q = v_fma(q, t, v_set1(6.382258163e-1f));
    q = v_fma(q, t, v_set1(1.127039951f));
    q = v_fma(q, t, v_set1(3.537407323e-4f));
    vf large = v_copysign(v_sub(v_set1(1.0f), v_exp(v_sub(v_set1(0.0f), q))), x);
    return v_if_less(v_set1(1.0f), v_abs(x), large, small);
}

/* 1 / (1 + e^-x) */
B2_INLINE vf v_sigmoid(vf x)
{
    return v_div(v_set1(1.0f), v_add(v_set1(1.0f), v_exp(v_sub(v_set1(0.0f), x))));
}

B2_INLINE vf v_gelu_tanh(vf x)
{
    /* (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
    vf cube = v_mul(v_mul(x, x), x);
    vf u = v_mul(v_set1(0.797884561f), v_fma(v_set1(0.044715f), cube, x));
    return v_mul(x, v_sigmoid(v_add(u, u)));
}

B2_INLINE vf v_act(vf x, b2_act act)
{
    switch (act) {
    case B2_ACT_NONE: return x;
    case B2_ACT_GELU_ERF:
        return v_mul(v_mul(x, v_set1(0.5f)), v_add(v_set1(1.0f), v_erf(v_mul(x, v_set1(0.707106781f)))));
    case B2_ACT_RELU: return v_max(v_set1(0.0f), x);
    case B2_ACT_GELU_TANH: return v_gelu_tanh(x);
    case B2_ACT_QUICK_GELU: return v_mul(x, v_sigmoid(v_mul(v_set1(1.702f), x)));
    case B2_ACT_SILU: return v_mul(x, v_sigmoid(x));
    }
    return x;
}
