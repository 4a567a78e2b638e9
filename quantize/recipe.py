"""recipe.py: which type each tensor gets. Data about shapes and names in, types out; no weights are read.

The named recipes choose what llama.cpp's mixes of those names choose, tensor by tensor: for the file itself under
--plain-mix, else for its size alone, so that files compare at equal bytes (see budget.py). A recipe is a default and a
few exceptions by role; what remains is the shape: rows that a type's block does not divide fall back to a type with
smaller blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as Type

from quantize.base.errors import ArgumentError
from quantize.encode.encoder import FLOAT_TYPES, row_bytes
from quantize.encode.grouped import GROUPS
from quantize.source.arch import Arch
from quantize.source.tensors import Tensor

# For rows that 256 does not divide. What 32 does not divide either becomes F16.
FALLBACKS = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.IQ3_S: Type.IQ4_NL,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.IQ2_S: Type.IQ4_NL,
    Type.IQ2_XS: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
}
DOWN_ROLES = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands, as far as recipes care."""

    il: int
    n_layer: int
    n_expert: int
    weighted: bool  # encoded under an importance matrix


Rule = Callable[[Place], Type | None]


def _heavy(place: Place) -> bool:
    """The first and last eighth of the layers and every third between: the mixes spend more on downs there."""
    eighth = place.n_layer // 8
    return place.il < eighth or place.il >= 7 * place.n_layer // 8 or (place.il - eighth) % 3 == 2


def _always(type_: Type) -> Rule:
    return lambda place: type_


def _where(condition: Callable[[Place], bool], type_: Type) -> Rule:
    return lambda place: type_ if condition(place) else None


def _first(fraction: int, type_: Type) -> Rule:
    return lambda place: type_ if place.il < place.n_layer // fraction else None


@dataclass(frozen=True)
class Recipe:
    """A named mix. ``roles`` overrides ``default``; a rule that answers None leaves the default."""

    name: str
    default: Type
    file_type: LlamaFileType
    roles: Mapping[str, Rule] = field(default_factory=dict)
    group: int | None = None  # columns that share a scale, for a checkpoint: see exporter.py

    @property
    def is_float(self) -> bool:
        """f32, f16, bf16: nothing to calibrate."""
        return self.default in FLOAT_TYPES

    @property
    def is_budget(self) -> bool:
        """Whether the name stands for a size, to be spent as measured; q8_0 and q4_0 mean those very types."""
        return not self.is_float and self.default not in (Type.Q8_0, Type.Q4_0)

    @property
    def wants_calibration(self) -> bool:
        """Whether the bytes depend on calibration: at 8 bits and above the encoders ignore importance."""
        return not self.is_float and self.default != Type.Q8_0


def _downs(rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(DOWN_ROLES, rule)


def _eight_experts(type_: Type, otherwise: Type | None = None) -> Rule:
    """Eight-expert models share one attention among them: its output projection gets more."""
    return lambda place: type_ if place.n_expert == 8 else otherwise


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", Type.F32, LlamaFileType.ALL_F32),
        Recipe("f16", Type.F16, LlamaFileType.MOSTLY_F16),
        Recipe("bf16", Type.BF16, LlamaFileType.MOSTLY_BF16),
        Recipe("q8_0", Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        Recipe("q6_k", Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
        Recipe("q5_k_m", Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _downs(_where(_heavy, Type.Q6_K))),
        Recipe(
            "q4_k_m",
            Type.Q4_K,
            LlamaFileType.MOSTLY_Q4_K_M,
            {**_downs(_where(_heavy, Type.Q6_K)), "attn_output": _eight_experts(Type.Q5_K)},
        ),
        Recipe(
            "iq4_xs",
            Type.IQ4_XS,
            LlamaFileType.MOSTLY_IQ4_XS,
            {
                **_downs(lambda place: None if place.weighted else _first(8, Type.Q5_K)(place)),
                "attn_output": _eight_experts(Type.Q5_K),
            },
        ),
        Recipe(
            "q3_k_m",
            Type.Q3_K,
            LlamaFileType.MOSTLY_Q3_K_M,
            {
                **_downs(lambda place: _first(16, Type.Q5_K)(place) or Type.Q4_K),
                "attn_output": _eight_experts(Type.Q5_K, Type.Q4_K),
            },
        ),
        Recipe(
            "q2_k",
            Type.Q2_K,
            LlamaFileType.MOSTLY_Q2_K,
            {**_downs(_always(Type.Q3_K)), "attn_output": _eight_experts(Type.Q5_K, Type.Q3_K)},
        ),
        Recipe(
            "q4_0",
            Type.Q4_0,
            LlamaFileType.MOSTLY_Q4_0,
            _downs(lambda place: _first(8, Type.Q4_1)(place) if place.weighted else None),
        ),
    )
}


EXPORTS = {
    f"w4a16-g{group}": Recipe(f"w4a16-g{group}", Type.Q4_0, LlamaFileType.MOSTLY_Q4_0, group=group) for group in GROUPS
}
"""What checkpoints for clusters are made of, which are no mixes of llama.cpp's."""


def find(name: str) -> Recipe:
    """A recipe by name, in any case. QuantizeError lists those there are."""
    recipe = RECIPES.get(name.lower()) or EXPORTS.get(name)
    if recipe is None:
        raise ArgumentError(f"unknown type `{name}`", f"one of {', '.join(RECIPES)}")
    return recipe


def nearest(arch: Arch, tensors: Sequence[Tensor], budget: int) -> Recipe:
    """The recipe whose mix comes nearest to so many bytes, of those that stand for a size."""

    def distance(recipe: Recipe) -> int:
        return abs(budget - sum(nbytes(t, type_of(recipe, arch, t, True)) for t in tensors))

    return min((recipe for recipe in RECIPES.values() if recipe.is_budget), key=distance)


def type_of(recipe: Recipe, arch: Arch, tensor: Tensor, weighted: bool) -> Type:
    """The type of one tensor. weighted: whether an importance matrix will be at hand."""
    if not tensor.is_matrix:
        return Type.F32
    if recipe.is_float:
        return recipe.default
    if recipe.group is not None:
        return recipe.default if _takes_groups(arch, tensor, recipe.group) else Type.BF16
    n = tensor.shape[-1]
    if tensor.role == "output" or (tensor.role == "token_embd" and arch.tied):
        # The head sees every token and turns error into probability: it is never cut below 6 bits here.
        return _fit(
            Type.Q8_0 if n % GGML_QUANT_SIZES[recipe.default][0] or recipe.default == Type.Q8_0 else Type.Q6_K, n
        )
    rule = recipe.roles.get(tensor.role)
    chosen = rule(Place(tensor.il, arch.n_layer, arch.n_expert, weighted)) if rule else None
    return _fit(chosen or recipe.default, n)


def _takes_groups(arch: Arch, tensor: Tensor, group: int) -> bool:
    """Whether a matrix may be integers of groups. Engines of clusters join gate and up, and all experts, and want them
    in one form; of kv_b_proj they make matrices of their own."""
    if tensor.il < 0 or tensor.role in ("attn_k_b", "attn_v_b"):
        return False
    if tensor.sublayer == "attention":
        return tensor.shape[-1] % group == 0
    width = tensor.shape[-1] if "_down" in tensor.role else tensor.shape[-2]
    return width % group == 0 and arch.n_embd % group == 0


def _fit(type_: Type, n: int) -> Type:
    """type_, or what replaces it for rows of n values."""
    if n % GGML_QUANT_SIZES[type_][0] == 0:
        return type_
    type_ = FALLBACKS.get(type_, type_)
    return type_ if n % GGML_QUANT_SIZES[type_][0] == 0 else Type.F16


def nbytes(tensor: Tensor, type_: Type) -> int:
    """Bytes of a tensor in a type."""
    return tensor.size // tensor.shape[-1] * row_bytes(type_, tensor.shape[-1])
