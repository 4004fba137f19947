"""Operators that work on every element by itself."""

from secateur.graph.join import broadcast
from secateur.graph.labels import along
from secateur.graph.operators.site import Result, Site
from secateur.graph.operators.step import as_target, cut_shape, with_shape
from secateur.graph.operators.table import FORBIDDEN, PLAIN, Constants, operator


@operator("dropout dropout_ native_dropout", PLAIN.but(trains="train"))
@operator("feature_dropout alpha_dropout feature_alpha_dropout", PLAIN.but(trains="train"))
@operator("lift_fresh_copy", PLAIN.but(constants=Constants(as_target("aten.clone.default"))))
@operator("detach_", PLAIN.but(constants=Constants(as_target("aten.detach.default"))))
# Random in evaluation mode, which the capture refuses; requires_grad_ computes nothing.
@operator("bernoulli bernoulli_ rand_like randn_like requires_grad_", FORBIDDEN)
@operator(
    """abs alias celu clone contiguous cos detach elu elu_ erf erf_ exp exp_ gelu gelu_ hardsigmoid hardsigmoid_
    hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ log log_ mish mish_ neg neg_ reciprocal relu relu_
    relu6 relu6_ round rsqrt selu selu_ sigmoid sigmoid_ silu silu_ sin softplus sqrt square tan tanh tanh_ to type_as
    _to_copy threshold threshold_ floor ceil log1p logit sign log_sigmoid bitwise_not logical_not fill fill_ zero_
    zeros_like ones_like full_like empty_like hardshrink softshrink isnan isinf nan_to_num expm1 log2 frac trunc
    positive real imag""",
    PLAIN,
)
def unary(site: Site) -> Result:
    return site.values(site.first.factors)


@operator(
    """add add_ pow pow_ sub sub_ rsub mul mul_ div div_ maximum minimum where addcmul addcmul_ addcdiv lerp lerp_ atan2
    fmod remainder eq ne lt le gt ge logical_and logical_or logical_xor masked_fill masked_fill_ copy_ copy clamp clamp_
    clamp_min clamp_min_ clamp_max clamp_max_ true_divide floor_divide bitwise_and bitwise_or bitwise_xor
    multiply subtract divide hypot complex""",
    PLAIN,
)
@operator("expand_as", PLAIN.but(repeats=True))
def elementwise(site: Site) -> Result:
    """In-place operators included: the tensor written to and what is written lose the same positions."""
    return broadcast(site.labels, site.operands, site.shape)


@operator("prelu", PLAIN)
def prelu(site: Site) -> Result:
    x, weight = site.first, site["weight"]
    if weight.shape != (1,):
        site.labels.tie(site.labels.axis(weight, 0, "scale"), site.labels.axis(x, 1))
    return site.value(x.factors)


# Checks compute nothing; they are left out of programs.
@operator("_assert_tensor_metadata _assert_async _assert_scalar", FORBIDDEN)
def nothing(site: Site) -> Result:
    return ()


@operator(
    "zeros ones full new_zeros new_ones new_full",
    PLAIN.but(constants=Constants(with_shape("size"), cut_shape("size"))),
)
def uniform(site: Site) -> Result:
    """A new tensor whose elements are all equal, so that it may become smaller along any dim."""
    rank = len(site.shape)
    sizes = [(dim, size) for dim, size in enumerate(site.shape) if size > 1]
    return site.value([along(site.labels.fresh(size), dim, rank) for dim, size in sizes])


@operator("empty new_empty", PLAIN.but(constants=Constants(with_shape("size"))))
@operator("linspace arange eye", PLAIN)
# Strides may ask for any amount of memory.
@operator("new_empty_strided", FORBIDDEN)
def constant(site: Site) -> Result:
    """A new tensor of given sizes, none of which is cut; what it is made from gives its type only."""
    return site.value([])


@operator("view_as_real", PLAIN)
def parts_of_complex(site: Site) -> Result:
    """Real and imaginary part become a new last dim."""
    return site.value([factor[..., None] for factor in site.first.factors])


@operator("view_as_complex", PLAIN)
def complex_of_parts(site: Site) -> Result:
    x = site.first
    rank = len(x.shape)
    factors = site.restrict(x, range(rank - 1), "real and imaginary parts")
    return site.value([factor[..., 0] for factor in factors])
