"""What the losses accept: every argument checked at the door, each with one message."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from warp_fast._sharded import is_sharded

if TYPE_CHECKING:
    from warp_fast._objective import Tokens

Kl: TypeAlias = Literal["reward", "reward_to_go", "k2", "k3", "reverse", "forward", "none"]
KINDS = get_args(Kl)
EXACT = ("reverse", "forward")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of temperature and softcap: some gradients have squares of scores, and (1e4 / 1e-12)^2 fits fp32
_LEAST, _MOST = 1e-12, 1e12


@dataclass(frozen=True)
class Terms:
    """The arguments of the objective, checked; vectors are [N] and 0 where masked."""

    advantages: Tensor
    anchor_logprobs: Tensor | None
    old_logprobs: Tensor | None
    clip_range: tuple[float, float] | None
    beta: float | Tensor
    kl: str

    def at(self, part: slice | Tensor) -> Terms:
        """Those of some of the rows."""
        anchor, old = self.anchor_logprobs, self.old_logprobs
        return replace(
            self,
            advantages=self.advantages[part],
            anchor_logprobs=None if anchor is None else anchor[part],
            old_logprobs=None if old is None else old[part],
        )


def number(name: str, given: Any) -> Any:
    """A number, as one of Python; or what a 0-dim tensor holds, which waits for a GPU."""
    if isinstance(given, (float, int, torch.SymFloat, torch.SymInt)):
        return given
    if isinstance(given, Tensor):
        _check_scalar(name, given)
        return given.item()
    if isinstance(given, Real):
        return float(given)
    if getattr(given, "ndim", None) == 0 and hasattr(given, "item"):  # an array of numpy
        return number(name, given.item())
    raise TypeError(f"{name} must be a number; got {type(given).__name__}")


def _check_scalar(name: str, given: Tensor) -> None:
    if given.dim() != 0 or given.dtype.is_complex or given.requires_grad:
        raise TypeError(
            f"{name} must be a number, or a real 0-dim tensor that requires no gradient, for "
            f"it gets none; got {tuple(given.shape)} {given.dtype}, "
            f"requires_grad={given.requires_grad}"
        )


def strength(given: Any, device: torch.device) -> Any:
    """beta: a number, or on the device a 0-dim tensor that cannot be looked at."""
    if isinstance(given, Tensor) and not can_look(given):
        _check_scalar("beta", given)
        return given.to(device, non_blocking=True)
    beta = number("beta", given)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and >= 0; got {beta}")
    return beta


def head(temperature: float, softcap: float | None) -> tuple[float, float | None]:
    """Temperature and softcap are numbers that fp32 can work with."""
    temperature = number("temperature", temperature)
    if not _LEAST <= temperature <= _MOST:
        raise ValueError(f"temperature must be from {_LEAST:g} to {_MOST:g}; got {temperature}")
    if softcap is None:
        return temperature, None
    softcap = number("softcap", softcap)
    if not _LEAST <= softcap <= _MOST:
        raise ValueError(f"softcap must be from {_LEAST:g} to {_MOST:g}, or None; got {softcap}")
    return temperature, softcap


def _tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(given).__name__}")


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def floating(name: str, tensor: Tensor) -> None:
    """A tensor that is whole and has a float dtype that the backends know."""
    _tensor(name, tensor)
    if is_sharded(tensor):
        raise ValueError(
            f"{name} must be a plain tensor; got a DTensor: under FSDP2 call the loss in a "
            "method of the module, with torch.distributed.fsdp.register_fsdp_forward_method"
        )
    if has_tangent(tensor):
        raise NotImplementedError(f"{name} must have no tangent: the losses have no jvp")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def has_tangent(tensor: Tensor) -> bool:
    """Whether a forward-mode derivative is asked for, which torch.library would give as 0."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def rows(logits: Tensor, name: str) -> None:
    """logits [..., V] has a vocabulary."""
    floating(name, logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V >= 1; got {tuple(logits.shape)}")


def token_ids(ids: Tensor, shape: torch.Size, device: torch.device, name: str) -> None:
    """Ids are integers, one per row of `name`, on its device."""
    _tensor("token_ids", ids)
    if not _is_integral(ids.dtype):
        raise TypeError(f"token_ids must be integers; got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(
            f"token_ids must have the shape of {name} less its last dimension, {tuple(shape)}; "
            f"got {tuple(ids.shape)}"
        )
    if ids.device != device:
        raise ValueError(f"token_ids must be on {device} like {name}; got {ids.device}")


def linear(states: Tensor, matrix: Tensor, states_name: str, matrix_name: str) -> None:
    """states [..., D] and matrix [V, D] fit."""
    floating(states_name, states)
    floating(matrix_name, matrix)
    fits = matrix.dim() == 2 and states.dim() >= 1 and states.shape[-1] == matrix.shape[1]
    if not fits or 0 in matrix.shape:
        raise ValueError(
            f"{states_name} must be [..., D] and {matrix_name} [V, D], V >= 1 and D >= 1; "
            f"got {tuple(states.shape)} and {tuple(matrix.shape)}"
        )
    if states.device != matrix.device:
        raise ValueError(
            f"{matrix_name} must be on {states.device} like {states_name}; got {matrix.device}"
        )


def vocabulary(anchor_weight: Tensor, weight: Tensor) -> None:
    """Both heads have the same rows."""
    if anchor_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"anchor_weight must have the {weight.shape[0]} rows of weight; "
            f"got {anchor_weight.shape[0]}"
        )


def same_shape(
    tensor: Tensor | None, name: str, like: Tensor, like_name: str, *, last: bool = True
) -> None:
    """tensor has the shape of `like`, with or without its last dimension."""
    if tensor is None:
        return
    _tensor(name, tensor)
    ours, theirs = (tensor.shape, like.shape) if last else (tensor.shape[:-1], like.shape[:-1])
    if ours != theirs or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {tuple(like.shape)} on {like.device} like {like_name}; "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )


def layout(
    shape: torch.Size,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
    name: str,
) -> None:
    """Padded [B, T], or packed [N] with cu_seqlens; the mask has the same shape.

    Both may be on the CPU instead of on the device of the rest.
    """
    where = f"on {device} or on the CPU" if device.type != "cpu" else "on cpu"
    places = (device, torch.device("cpu"))
    if cu_seqlens is None and len(shape) != 2:
        raise ValueError(
            f"{name} must be padded [B, T, ...], or packed [N, ...] with cu_seqlens; got "
            f"{len(shape) + 1} dimensions without cu_seqlens"
        )
    if mask is not None:
        _check_mask(mask, shape, places, where)
    if cu_seqlens is None:
        return
    if len(shape) != 1:
        raise ValueError(f"with cu_seqlens {name} must be packed [N, ...]; got [B, T, ...]")
    _check_bounds(cu_seqlens, shape[0], places, where)
    if mask is not None and mask.device != cu_seqlens.device:
        raise ValueError(
            f"mask and cu_seqlens must be on one device, {where}; got {mask.device} and "
            f"{cu_seqlens.device}"
        )


def _check_mask(
    mask: Tensor, shape: torch.Size, places: tuple[torch.device, ...], where: str
) -> None:
    _tensor("mask", mask)
    if mask.shape != shape or mask.device not in places:
        raise ValueError(
            f"mask must be {tuple(shape)} {where}; got {tuple(mask.shape)} on {mask.device}"
        )
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be bool, or 1 where a token counts, else 0; got {mask.dtype}")
    if mask.dtype != torch.bool and can_look(mask):
        odd = mask[(mask != 0) & (mask != 1)]
        if len(odd):
            raise ValueError(f"mask must be bool, or 1 where a token counts, else 0; got {odd[0]}")


def _check_bounds(
    cu_seqlens: Tensor, count: int, places: tuple[torch.device, ...], where: str
) -> None:
    """cu_seqlens rises from 0 to the count of tokens."""
    _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or not _is_integral(cu_seqlens.dtype):
        raise ValueError(
            f"cu_seqlens must be [B + 1] integers; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device not in places:
        raise ValueError(f"cu_seqlens must be {where}; got {cu_seqlens.device}")
    if can_look(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != count or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to N = {count}; got {bounds[:4]} ... {bounds[-1]}"
            )


def can_look(tensor: Tensor) -> bool:
    """Whether values can be read here: not in a trace, nor one for all of torch.func.vmap, nor
    where it waits for a GPU."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or is_batchedtensor(tensor):
        return False
    return tensor.device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; if not pinned, the host would wait for what is queued on the device."""
    if device.type == "cuda" and can_look(tensor) and not torch.cuda.is_current_stream_capturing():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def terms(
    tokens: Tokens,
    advantages: Tensor,
    has_anchor: bool,
    anchor_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    beta: float | Tensor,
    kl: str,
    clip_range: float | tuple[float, float] | None,
) -> Terms:
    """Check what the objective is made of, and lay it out per token."""
    _check_kl(kl, has_anchor, anchor_logprobs)
    if clip_range is not None and old_logprobs is None:
        raise ValueError("clip_range must come with old_logprobs, whose ratio it clips; got none")
    return Terms(
        _per_token_advantages(tokens, advantages),
        _per_token(tokens, anchor_logprobs, "anchor_logprobs"),
        _per_token(tokens, old_logprobs, "old_logprobs", finite=True),
        _clip_bounds(clip_range),
        strength(beta, tokens.mask.device),
        kl,
    )


def _check_kl(kl: str, has_anchor: bool, anchor_logprobs: Tensor | None) -> None:
    if kl == "k1":
        raise ValueError(
            "kl='k1' as a loss has zero gradient in expectation; use 'reward' (k1 inside the "
            "reward) or 'k2', which have the gradient of the reverse KL"
        )
    if kl not in KINDS:
        raise ValueError(f"kl must be one of {', '.join(KINDS)}; got {kl!r}")
    if has_anchor and anchor_logprobs is not None:
        raise ValueError(
            "the anchor must be given once; got anchor_logprobs and its logits or hidden states"
        )
    if kl in EXACT and not has_anchor:
        raise ValueError(
            f"kl={kl!r} sums over the vocabulary and needs anchor_logits (or anchor_hidden); "
            f"got {'anchor_logprobs' if anchor_logprobs is not None else 'no anchor'}"
        )
    if kl != "none" and not has_anchor and anchor_logprobs is None:
        raise ValueError(f"kl={kl!r} needs an anchor; got none (kl='none' is without one)")


def _per_token(
    tokens: Tokens, values: Tensor | None, name: str, finite: bool = False
) -> Tensor | None:
    """[N], 0 where masked; numbers, or -inf if they need not be finite."""
    if values is None:
        return None
    floating(name, values)
    if values.dtype.itemsize < 4:
        raise TypeError(
            f"{name} must be float32 or float64, since 16 bits round by more than the KL to a slow "
            f"anchor; got {values.dtype} (FSDP2: MixedPrecisionPolicy(cast_forward_inputs=False))"
        )
    if values.shape != tokens.shape or values.device != tokens.mask.device:
        raise ValueError(
            f"{name} must be {tuple(tokens.shape)} on {tokens.mask.device} like token_ids; "
            f"got {tuple(values.shape)} on {values.device}"
        )
    flat = torch.where(tokens.mask, values.detach().reshape(-1), 0)
    if can_look(flat):
        wrong = ~flat.isfinite() if finite else ~(flat < math.inf)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name} must not be NaN or {'infinite' if finite else 'inf'} where the mask is "
                f"set; row {at} is {float(flat[at])}"
            )
    return flat


def _per_token_advantages(tokens: Tokens, advantages: Tensor) -> Tensor:
    """[N], 0 where masked, from [B] or else the shape of token_ids."""
    floating("advantages", advantages)
    if advantages.device != tokens.mask.device:
        raise ValueError(f"advantages must be on {tokens.mask.device}; got {advantages.device}")
    if advantages.shape == (tokens.count,):
        spread = advantages.detach()[tokens.sequence]
    elif advantages.shape == tokens.shape:
        spread = advantages.detach().reshape(-1)
    else:
        raise ValueError(
            f"advantages must be [B] = [{tokens.count}] or per token {list(tokens.shape)}; "
            f"got {list(advantages.shape)}"
        )
    spread = torch.where(tokens.mask, spread, 0)
    if can_look(spread) and spread.isnan().any():
        at = int(spread.isnan().nonzero()[0])
        raise ValueError(f"advantages must not be NaN where the mask is set; row {at} is")
    return spread


def _clip_bounds(clip_range: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip_range is None:
        return None
    given = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    pair = [number("each bound of clip_range", bound) for bound in given]
    if len(pair) != 2 or not (0 <= pair[0] <= 1 and 0 <= pair[1] < math.inf):
        raise ValueError(
            f"clip_range must be one number or (low, high) with 0 <= low <= 1 and high >= 0; "
            f"got {clip_range}"
        )
    return float(pair[0]), float(pair[1])


def normalizer(given: str | float | Tensor, mask: Tensor) -> None:
    """Z is a known name, a positive number, or a 0-dim tensor; 0 for a batch without tokens."""
    if isinstance(given, Tensor):
        if given.dim() != 0 or given.dtype.is_complex:
            raise ValueError(
                f"a tensor normalizer must be 0-dim and real; got {tuple(given.shape)} "
                f"{given.dtype}"
            )
        if not can_look(given):
            return
    elif isinstance(given, str):
        if given not in ("sequence", "token"):
            raise ValueError(
                f"normalizer must be 'sequence', 'token' or a positive number; got {given!r}"
            )
        return
    value = given.item() if isinstance(given, Tensor) else number("normalizer", given)
    if value == 0 and can_look(mask) and not mask.any():
        return
    if not 0 < value < math.inf:
        raise ValueError(f"normalizer must be positive and finite; got {given}")
