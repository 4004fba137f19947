"""Operators that work on every element by itself."""

from secateur.graph.join import broadcast
from secateur.graph.rules.site import Result, Site, rule


@rule(
    *"abs alias celu clone contiguous cos detach detach_ dropout dropout_ feature_dropout".split(),
    *"alpha_dropout bernoulli bernoulli_ elu elu_ erf erf_ exp exp_ gelu gelu_ hardsigmoid hardsigmoid_".split(),
    *"hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ lift_fresh_copy log log_ mish mish_".split(),
    *"neg neg_ reciprocal relu relu_ relu6 relu6_ round rsqrt selu selu_ sigmoid sigmoid_ silu silu_".split(),
    *"sin softplus sqrt square tan tanh tanh_ to type_as _to_copy threshold threshold_ floor ceil log1p".split(),
    *"logit sign log_sigmoid bitwise_not logical_not fill fill_ zero_ zeros_like ones_like full_like".split(),
    *"empty_like rand_like randn_like native_dropout tanhshrink hardshrink softshrink isnan isinf".split(),
    *"nan_to_num expm1 log2 frac trunc positive float half double requires_grad_ softsign".split(),
)
def unary(site: Site) -> Result:
    return site.values(site.first.factors)


@rule(
    *"add add_ pow pow_ sub sub_ rsub mul mul_ div div_ maximum minimum where addcmul addcmul_ addcdiv".split(),
    *"lerp lerp_ atan2 fmod remainder eq ne lt le gt ge logical_and logical_or logical_xor masked_fill".split(),
    *"masked_fill_ copy_ copy clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ expand_as".split(),
    *"true_divide floor_divide bitwise_and bitwise_or bitwise_xor multiply subtract divide hypot".split(),
)
def elementwise(site: Site) -> Result:
    """In-place operators included: the tensor written to and what is written lose the same positions."""
    return broadcast(site.labels, site.operands, site.shape)


@rule("prelu")
def prelu(site: Site) -> Result:
    x, weight = site.first, site["weight"]
    if weight.shape != (1,):
        site.labels.tie(site.labels.axis(weight, 0, "scale"), site.labels.axis(x, 1))
    return site.value(x.factors)


@rule("_assert_tensor_metadata", "_assert_async", "sym_size", "_assert_scalar", "sym_numel")
def nothing(site: Site) -> Result:
    return ()


@rule(
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "linspace", "arange", "full", "eye"
)
def constant(site: Site) -> Result:
    """A new tensor of given sizes; what it is made from gives its type only."""
    return site.value([])
