# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the wire formats on blocks of elements, in Triton.

Integer operations on the bits of fp32, because backends' own casts to fp8 differ and
some have none. Launches must pass ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGN = tl.constexpr(-0x80000000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
SCALE_MIN = tl.constexpr(0x0D800000)  # bits of 2**-100
SCALE_MAX = tl.constexpr(0x7F7F0000)  # bits of the largest bf16


@triton.jit
def as_int(values):
    return values.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def small_decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):  # noqa: N803
    """Bits of the value of a finite code without sign (``MANTISSA`` bits, exponent bias ``BIAS``)."""
    SHIFT: tl.constexpr = 23 - MANTISSA  # noqa: N806
    LEAST: tl.constexpr = (128 - BIAS) << 23  # noqa: N806
    shifted = code << SHIFT
    least = as_float(tl.full(code.shape, LEAST, tl.int32))
    denormal = as_int(as_float(shifted | LEAST) - least)
    return tl.where((code >> MANTISSA) != 0, shifted + ((127 - BIAS) << 23), denormal)


@triton.jit
def small_encode(magnitude, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):  # noqa: N803
    """Code without sign of a finite magnitude's bits; saturates at ``LARGEST``."""
    SHIFT: tl.constexpr = 23 - MANTISSA  # noqa: N806
    MAGIC: tl.constexpr = (128 - BIAS + SHIFT) << 23  # noqa: N806
    finite = tl.minimum(magnitude, (LARGEST << SHIFT) + ((127 - BIAS) << 23))
    half = ((1 << (SHIFT - 1)) - 1) - ((127 - BIAS) << 23)
    normal = (finite + half + ((finite >> SHIFT) & 1)) >> SHIFT
    denormal = as_int(as_float(finite) + as_float(tl.full(finite.shape, MAGIC, tl.int32))) - MAGIC
    return tl.where(finite < ((128 - BIAS) << 23), denormal, normal)


@triton.jit
def to_fp32(raw, DTYPE: tl.constexpr):  # noqa: N803
    """The exact values of raw bits (int32, int16 or uint8)."""
    if DTYPE == "fp32":
        return as_float(raw)
    elif DTYPE == "bf16":
        return as_float(raw.to(tl.int32) << 16)
    elif DTYPE == "fp16":
        bits = raw.to(tl.int32)
        code = bits & 0x7FFF
        special = INFINITY | ((code & 0x3FF) << 13)
        magnitude = tl.where(code >= 0x7C00, special, small_decode(code, 10, 15))
        return as_float(magnitude | ((bits & 0x8000) << 16))
    elif DTYPE == "fp8_e4m3":
        bits = raw.to(tl.int32)
        code = bits & 0x7F
        magnitude = tl.where(code == 0x7F, 0x7FC00000, small_decode(code, 3, 7))
        return as_float(magnitude | ((bits & 0x80) << 24))
    else:
        tl.static_assert(DTYPE == "fp8_e5m2")
        bits = raw.to(tl.int32)
        code = bits & 0x7F
        special = tl.where(code == 0x7C, INFINITY, 0x7FC00000)
        magnitude = tl.where(code >= 0x7C, special, small_decode(code, 2, 15))
        return as_float(magnitude | ((bits & 0x80) << 24))


@triton.jit
def from_fp32(values, DTYPE: tl.constexpr):  # noqa: N803
    """Raw bits: nearest even, finite values saturate, a NaN keeps nothing but its sign."""
    bits = as_int(values)
    magnitude = bits & MAGNITUDE
    if DTYPE == "fp32":
        return tl.where(magnitude > INFINITY, (bits & SIGN) | 0x7FC00000, bits)
    elif DTYPE == "bf16":
        finite = tl.minimum(magnitude, SCALE_MAX)
        code = (finite + 0x7FFF + ((finite >> 16) & 1)) >> 16
        code = tl.where(magnitude == INFINITY, 0x7F80, code)
        code = tl.where(magnitude > INFINITY, 0x7FC0, code)
        return (code | ((bits >> 16) & 0x8000)).to(tl.int16)
    elif DTYPE == "fp16":
        code = small_encode(magnitude, 10, 15, 0x7BFF)
        code = tl.where(magnitude == INFINITY, 0x7C00, code)
        code = tl.where(magnitude > INFINITY, 0x7E00, code)
        return (code | ((bits >> 16) & 0x8000)).to(tl.int16)
    elif DTYPE == "fp8_e4m3":
        code = tl.where(magnitude > INFINITY, 0x7F, small_encode(magnitude, 3, 7, 0x7E))
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        tl.static_assert(DTYPE == "fp8_e5m2")
        code = tl.where(magnitude > INFINITY, 0x7E, small_encode(magnitude, 2, 15, 0x7B))
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scaled(values, factor):
    """A NaN keeps its sign, which devices' own multiplication loses."""
    return tl.where((as_int(values) & MAGNITUDE) > INFINITY, values, values * factor)


@triton.jit
def bf16_up(bits):
    """A scale's bits from those of a positive fp32."""
    return tl.minimum(tl.maximum((bits + 0xFFFF) & -0x10000, SCALE_MIN), SCALE_MAX)


@triton.jit
def of_key(keys):
    """The float that an ordered key stands for: its magnitude's bits, negated below zero."""
    return as_float(tl.where(keys < 0, (-keys) | SIGN, keys))


@triton.jit
def down_key(keys):
    """Key of the largest bf16 at or below a finite float's key."""
    away = tl.minimum((0xFFFF - keys) & -0x10000, SCALE_MAX)
    return tl.where(keys < 0, -away, keys & -0x10000)


@triton.jit
def nibbles_of(values, reciprocal, zero, ZERO_POINT: tl.constexpr):  # noqa: N803
    """int4 codes 0 to 15 as int32."""
    numbers = tl.where((as_int(values) & MAGNITUDE) > INFINITY, 0.0, values)
    if ZERO_POINT:
        steps = (numbers - zero) * reciprocal
        steps = tl.minimum(tl.maximum(steps, 0.0), 15.0)
        return as_int(steps + 8388608.0) & 0xF  # 2**23: nearest even lands in the low bits
    else:
        bits = as_int(numbers * reciprocal)
        magnitude = as_float(tl.minimum(bits & MAGNITUDE, 0x40E00000))  # 7.0
        code = as_int(magnitude + 8388608.0) & 0xF
        return tl.where(bits < 0, -code, code) & 0xF
