//! Arithmetic whose bits are the GPU's.

/// The NaN that the GPU's arithmetic gives.
const NAN: f32 = f32::from_bits(0x7fff_ffff);

/// `fma.rn.f32`.
pub(crate) fn fma(a: f32, b: f32, c: f32) -> f32 {
    canonical(a.mul_add(b, c))
}

/// `max.f32`: a number wins over a NaN, +0 over -0.
pub(crate) fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || a < b || (a == b && a.is_sign_negative()) { canonical(b) } else { a }
}

/// `min.f32`: a number wins over a NaN, -0 over +0.
pub(crate) fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b || (a == b && a.is_sign_positive()) { canonical(b) } else { a }
}

/// `cvt.rn.bf16.f32`.
pub(crate) fn to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let bits = value.to_bits();
    let half = 0x7fff + (bits >> 16 & 1);
    (bits.wrapping_add(half) >> 16) as u16
}

/// `atom.add.f32`: in global memory subnormals count as zero, in shared memory they don't.
pub(crate) fn atomic_add(a: f32, b: f32, flush: bool) -> f32 {
    let flushed = |x: f32| if flush && x.is_subnormal() { 0.0_f32.copysign(x) } else { x };
    canonical(flushed(flushed(a) + flushed(b)))
}

fn canonical(x: f32) -> f32 {
    if x.is_nan() { NAN } else { x }
}
