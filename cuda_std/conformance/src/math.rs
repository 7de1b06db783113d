//! Arithmetic, over any bits.

macro_rules! unary {
    ($($case:ident: $function:ident = $ptx:literal;)* { $($rest:tt)* }) => {
        conform! { CASES:
            $(
                $case(
                    covers = [concat!("math::", stringify!($function))], expects = [$ptx],
                    in = [u32; 16], out = [u32; 16],
                ) |io| {
                    let mut index = 0;
                    while index < 16 {
                        io.put(math::$function(f32::from_bits(io.take())).to_bits());
                        index += 1;
                    }
                }
            )*
            $($rest)*
        }
    };
}

unary! {
    math_exp2_approx: exp2_approx = "ex2.approx.ftz.f32";
    math_reciprocal_approx: reciprocal_approx = "rcp.approx.ftz.f32";
    math_rsqrt_approx: rsqrt_approx = "rsqrt.approx.ftz.f32";
{
    math_fma(covers = ["math::fma"], expects = ["fma.rn.f32"], in = [u32; 24], out = [u32; 8]) |io| {
        let mut index = 0;
        while index < 8 {
            let (a, b, c) = (io.take(), io.take(), io.take());
            io.put(math::fma(f32::from_bits(a), f32::from_bits(b), f32::from_bits(c)).to_bits());
            index += 1;
        }
    }

    math_max(covers = ["math::max"], expects = ["max.f32"], in = [u32; 16], out = [u32; 8]) |io| {
        let mut index = 0;
        while index < 8 {
            let (a, b) = (io.take(), io.take());
            io.put(math::max(f32::from_bits(a), f32::from_bits(b)).to_bits());
            index += 1;
        }
    }

    math_min(covers = ["math::min"], expects = ["min.f32"], in = [u32; 16], out = [u32; 8]) |io| {
        let mut index = 0;
        while index < 8 {
            let (a, b) = (io.take(), io.take());
            io.put(math::min(f32::from_bits(a), f32::from_bits(b)).to_bits());
            index += 1;
        }
    }

    // Where rounding twice would show: c nearly cancels a * b.
    math_fma_cancels(
        covers = ["math::fma"], expects = ["fma.rn.f32"],
        in = [f32; 16], out = [f32; 8], domain = crate::Domain::FiniteFloats,
    ) |io| {
        let mut index = 0;
        while index < 8 {
            let (a, b) = (io.take(), io.take());
            io.put(math::fma(a, b, -(a * b)));
            index += 1;
        }
    }

    bf16_pack(covers = ["bf16::pack"], expects = ["cvt.rn.bf16x2.f32"], in = [u32; 16], out = [u32; 8]) |io| {
        let mut index = 0;
        while index < 8 {
            let (low, high) = (io.take(), io.take());
            io.put(bf16::pack(f32::from_bits(low), f32::from_bits(high)));
            index += 1;
        }
    }

    bf16_unpack(covers = ["bf16::unpack"], expects = ["shl.b32", "and.b32"], in = [u32; 8], out = [u32; 16]) |io| {
        let mut index = 0;
        while index < 8 {
            let (low, high) = bf16::unpack(io.take());
            io.put(low.to_bits());
            io.put(high.to_bits());
            index += 1;
        }
    }

    bf16_from_f32(
        covers = ["bf16::from_f32"], expects = ["cvt.rn.bf16.f32"],
        in = [u32; 16], out = [u16; 16],
    ) |io| {
        let mut index = 0;
        while index < 16 {
            io.put(bf16::from_f32(f32::from_bits(io.take())));
            index += 1;
        }
    }

    bf16_to_f32(covers = ["bf16::to_f32"], expects = ["shl.b32"], in = [u16; 16], out = [u32; 16]) |io| {
        let mut index = 0;
        while index < 16 {
            io.put(bf16::to_f32(io.take()).to_bits());
            index += 1;
        }
    }
} }
