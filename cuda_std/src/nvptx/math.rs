use core::arch::asm;

unsafe extern "C" {
    #[link_name = "llvm.fma.f32"]
    fn llvm_fma(a: f32, b: f32, c: f32) -> f32;
}

#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    // SAFETY: arithmetic.
    unsafe { llvm_fma(a, b, c) }
}

macro_rules! binary {
    ($($name:ident = $ptx:literal;)*) => { $(
        #[inline(always)]
        pub fn $name(a: f32, b: f32) -> f32 {
            let result;
            // SAFETY: arithmetic.
            unsafe {
                asm!(
                    concat!($ptx, " {result}, {a}, {b};"),
                    a = in(reg32) a,
                    b = in(reg32) b,
                    result = out(reg32) result,
                    options(pure, nomem, nostack, preserves_flags)
                )
            }
            result
        }
    )* };
}
binary! {
    max = "max.f32";
    min = "min.f32";
}

macro_rules! unary {
    ($($name:ident = $ptx:literal;)*) => { $(
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y;
            // SAFETY: arithmetic.
            unsafe {
                asm!(
                    concat!($ptx, " {y}, {x};"),
                    x = in(reg32) x,
                    y = out(reg32) y,
                    options(pure, nomem, nostack, preserves_flags)
                )
            }
            y
        }
    )* };
}
unary! {
    exp2_approx = "ex2.approx.ftz.f32";
    reciprocal_approx = "rcp.approx.ftz.f32";
    rsqrt_approx = "rsqrt.approx.ftz.f32";
}

#[inline(always)]
pub fn pack_bf16(low: f32, high: f32) -> u32 {
    let pair;
    // SAFETY: arithmetic.
    unsafe {
        asm!(
            "cvt.rn.bf16x2.f32 {pair}, {high}, {low};",
            low = in(reg32) low,
            high = in(reg32) high,
            pair = out(reg32) pair,
            options(pure, nomem, nostack, preserves_flags)
        )
    }
    pair
}

#[inline(always)]
pub fn from_f32_bf16(value: f32) -> u16 {
    let bits;
    // SAFETY: arithmetic.
    unsafe {
        asm!(
            "cvt.rn.bf16.f32 {bits}, {value};",
            value = in(reg32) value,
            bits = out(reg16) bits,
            options(pure, nomem, nostack, preserves_flags)
        )
    }
    bits
}
