# mypy: disable-error-code="call-arg"
"""Floats as bits, inside compiled loops: what numba has no words for.

Each function becomes a few instructions; on vectors LLVM picks those the processor has.

dtypes: numba knows no 16-bit floats.  An int16 array holds float16 bits here, a uint16 array
bfloat16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from hvd_dls.core.jit import jit

LANES = 64  # entries compared at once

_FLOATS = {types.float32: 32, types.float64: 64}


def _like(shape: ir.Type, element: ir.Type) -> ir.Type:
    """``element``, or as many of them as ``shape`` has lanes."""
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def _constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _widen(builder: ir.IRBuilder, value: ir.Value, dtype: types.Type) -> ir.Value:
    """float16 and bfloat16 bits (see above) as float32, exactly; other floats as they are.

    In bit operations: conversion instructions are not there on every processor.
    """
    if dtype in _FLOATS:
        return value
    integer, single = _like(value.type, ir.IntType(32)), _like(value.type, ir.FloatType())
    bits = builder.zext(value, integer)
    if dtype == types.uint16:
        return builder.bitcast(builder.shl(bits, _constant(integer, 16)), single)
    # Exponent and mantissa where float32 has them; the bias differs by 112, subnormals included.
    rest = builder.shl(builder.and_(bits, _constant(integer, 0x7FFF)), _constant(integer, 13))
    number = builder.fmul(builder.bitcast(rest, single), _constant(single, 2.0**112))
    special = builder.icmp_unsigned(">=", rest, _constant(integer, 0x7C00 << 13))
    number = builder.select(
        special,
        builder.or_(rest, _constant(integer, 0x7F800000)),
        builder.bitcast(number, integer),
    )
    sign = builder.shl(builder.and_(bits, _constant(integer, 0x8000)), _constant(integer, 16))
    return builder.bitcast(builder.or_(number, sign), single)


def _unsigned(builder: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """The bits of floats without the signs."""
    integer = _like(value.type, ir.IntType(width))
    bits = builder.bitcast(value, integer)
    return builder.and_(bits, _constant(integer, (1 << (width - 1)) - 1))


@intrinsic
def widened(_: Any, value: types.Type) -> Any:
    """One gradient entry as a float that adds."""
    result = value if value in _FLOATS else types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return _widen(builder, args[0], signature.args[0])

    return result(value), generate


@intrinsic
def magnitude(_: Any, value: types.Type) -> Any:
    """The bits of a float without the sign as uint64: ordered like the magnitudes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        width = _FLOATS[signature.args[0]]
        return builder.zext(_unsigned(builder, args[0], width), ir.IntType(64))

    return types.uint64(value), generate


@intrinsic
def number(_: Any, magnitude: types.Type, like: types.Type) -> Any:
    """The float of ``like``'s dtype with these magnitude bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        bits = (
            builder.trunc(args[0], ir.IntType(_FLOATS[like])) if like == types.float32 else args[0]
        )
        return builder.bitcast(bits, context.get_data_type(like))

    return like(types.uint64, like), generate


def _load(context: Any, builder: Any, array: Any, value: Any, start: Any) -> ir.Value:
    """LANES floats of an array from an entry on."""
    first = context.make_array(array)(context, builder, value).data
    vector = ir.VectorType(context.get_data_type(array.dtype), LANES).as_pointer()
    where = builder.bitcast(builder.gep(first, [start]), vector)
    loaded = builder.load(where, align=array.dtype.bitwidth // 8)
    return _widen(builder, loaded, array.dtype)


def _reaching(builder: ir.IRBuilder, values: ir.Value, bound: ir.Value) -> ir.Value:
    """Mask, one bit a lane, of the values whose magnitude reaches the bound (uint64)."""
    width = 32 if isinstance(values.type.element, ir.FloatType) else 64
    magnitudes = _unsigned(builder, values, width)
    one = bound if width == 64 else builder.trunc(bound, ir.IntType(width))
    undefined = ir.Constant(magnitudes.type, ir.Undefined)
    zero = ir.Constant(ir.IntType(32), 0)
    first = builder.insert_element(undefined, one, zero)
    zeros = _constant(ir.VectorType(ir.IntType(32), LANES), 0)
    bounds = builder.shuffle_vector(first, undefined, zeros)
    return builder.bitcast(builder.icmp_unsigned(">=", magnitudes, bounds), ir.IntType(LANES))


@intrinsic
def reaching(_: Any, values: types.Type, start: types.Type, bound: types.Type) -> Any:
    """Mask of those of the LANES values from ``start`` whose magnitude >= bound."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        loaded = _load(context, builder, signature.args[0], args[0], args[1])
        return _reaching(builder, loaded, args[2])

    return types.uint64(values, types.int64, types.uint64), generate


@intrinsic
def sums_reaching(
    _: Any, residual: types.Type, gradient: types.Type, start: types.Type, bound: types.Type
) -> Any:
    """Mask of those of the LANES entries from ``start`` with |residual + gradient| >= bound."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        old = _load(context, builder, signature.args[0], args[0], args[2])
        new = _load(context, builder, signature.args[1], args[1], args[2])
        return _reaching(builder, builder.fadd(old, new), args[3])

    return types.uint64(residual, gradient, types.int64, types.uint64), generate


@intrinsic
def lowest_one(_: Any, mask: types.Type) -> Any:
    """Position of the lowest one in a mask that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def element(_: Any, address: types.Type, number: types.Type, like: types.Type) -> Any:
    """Entry ``number`` of the array of ``like``'s dtype that starts at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        element = context.get_data_type(signature.args[2])
        first = builder.inttoptr(args[0], element.as_pointer())
        return builder.load(builder.gep(first, [args[1]]))

    return like(types.int64, types.int64, like), generate


@intrinsic
def word_at(_: Any, address: types.Type) -> Any:
    """The eight bytes from an address on, wherever it is, as little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:
        word = ir.IntType(64)
        return builder.load(builder.inttoptr(args[0], word.as_pointer()), align=1)

    return types.uint64(types.uint64), generate


def rounded(value: float, like: float) -> float:
    """What to store of a value in an array with entries like that one."""
    raise NotImplementedError  # compiled code only


@overload(rounded)
def _round_to(value, like):  # type: ignore[no-untyped-def]
    if like == types.int16:
        return lambda value, like: _half(value)
    if like == types.uint16:
        return lambda value, like: _bfloat(value)
    return lambda value, like: value


@jit
def _half(value: Any) -> Any:
    """float16 bits of a float32: to nearest, ties to even."""
    bits = np.int64(magnitude(value))
    if bits > 0x7F800000:
        half = np.int64(0x7E00)  # NaN
    elif bits >= 0x47800000:
        half = np.int64(0x7C00)  # from 2**16 up: Inf
    elif bits < 0x38800000:  # subnormal in float16, in units of 2**-24
        half = np.int64(np.rint(abs(value) * np.float32(2.0**24)))
    else:
        half = (bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13
    return np.int16(half | (0x8000 if np.signbit(value) else 0))


@jit
def _bfloat(value: Any) -> Any:
    """bfloat16 bits of a float32: to nearest, ties to even."""
    bits = np.int64(magnitude(value))
    if bits > 0x7F800000:
        return np.uint16(0x7FC0)  # NaN
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.uint16(upper | (0x8000 if np.signbit(value) else 0))
