//! Bit-exact models of three special function unit (`MUFU`) instructions of an NVIDIA H200:
//! `ex2.approx.ftz.f32`, `rcp.approx.ftz.f32` and `rsqrt.approx.ftz.f32`.
//!
//! The form is that of S. F. Oberman and M. Y. Siu, "A High-Performance Area-Efficient
//! Multifunction Interpolator" (ARITH 2005): the leading bits of the reduced argument select a
//! segment, the remaining bits `xl` enter `C0 + C1 * xl + C2 * xl^2` in fixed point, where a
//! squarer without its low columns forms `xl^2`. The coefficients, the biases and the columns the
//! squarer drops were recovered from an exhaustive dump of an H200: every mantissa of `rcp` and
//! `rsqrt`, every 23-bit fraction of `ex2`, and samples of every exponent.

/// The NaN the unit returns for every invalid operation and NaN input.
const NAN: u32 = 0x7fff_ffff;
const INF: u32 = 0x7f80_0000;
const SIGN: u32 = 0x8000_0000;
/// The implicit bit of an f32 significand; also the least normal f32 as bits.
const ONE: u32 = 1 << 23;

/// Added before the final truncation, in units of 2^-16 of the result's last place.
const EX2_BIAS: i64 = 12228;
const RCP_BIAS: i64 = 4046;
const RSQRT_BIAS: i64 = 16383;

/// `ex2.approx.ftz.f32`: the model of `2^x`.
pub(crate) fn ex2_approx_ftz(x: f32) -> f32 {
    let bits = x.to_bits();
    let magnitude = bits & !SIGN;
    let negative = bits != magnitude;
    if magnitude > INF {
        return f32::from_bits(NAN);
    }
    if x.abs() >= 128.0 {
        return f32::from_bits(if negative { 0 } else { INF });
    }
    // |x| with 23 fraction bits, truncated; a subnormal shifts out entirely.
    let exponent = magnitude >> 23;
    let significand = (magnitude % ONE) | ONE;
    let fixed = if exponent < 127 {
        significand >> (127 - exponent).min(31)
    } else {
        significand << (exponent - 127)
    } as i32;
    // The unit negates by complementing, one too low, except where that would spoil an integer.
    let fixed = if !negative {
        fixed
    } else if (fixed as u32).is_multiple_of(ONE) {
        -fixed
    } else {
        !fixed
    };
    let exponent = 127 + (fixed >> 23);
    if exponent <= 0 {
        return 0.0; // Subnormal, flushed.
    }
    let fraction = fixed as u32 % ONE;
    let segment = &EX2[(fraction >> 17) as usize];
    let result = interpolate(segment, fraction % (1 << 17), EX2_BIAS);
    f32::from_bits(((exponent as u32) << 23) + (result - ONE))
}

/// `rcp.approx.ftz.f32`: the model of `1 / x`.
pub(crate) fn rcp_approx_ftz(x: f32) -> f32 {
    let bits = x.to_bits();
    let magnitude = bits & !SIGN;
    let sign = bits & SIGN;
    if magnitude > INF {
        return f32::from_bits(NAN);
    }
    if magnitude < ONE {
        return f32::from_bits(sign | INF);
    }
    let fraction = magnitude % ONE;
    let segment = &RCP[(fraction >> 16) as usize];
    // Seven bits select the segment; the other 16 take the upper bits of the 17-bit datapath.
    let result = interpolate(segment, (fraction % (1 << 16)) << 1, RCP_BIAS);
    // The result has exponent 253 - e, or one more where it reaches 2^24, by the carry.
    let scaled = (253 - (magnitude >> 23) as i32) * ONE as i32 + (result - ONE) as i32;
    let flushed = if scaled < ONE as i32 { 0 } else { scaled as u32 };
    f32::from_bits(sign | flushed)
}

/// `rsqrt.approx.ftz.f32`: the model of `1 / sqrt(x)`.
pub(crate) fn rsqrt_approx_ftz(x: f32) -> f32 {
    let bits = x.to_bits();
    let magnitude = bits & !SIGN;
    let sign = bits & SIGN;
    if magnitude < ONE {
        return f32::from_bits(sign | INF);
    }
    if magnitude > INF || sign != 0 {
        return f32::from_bits(NAN);
    }
    if magnitude == INF {
        return 0.0;
    }
    // x = m * 4^k with m in [1, 4): biased exponents are odd where m < 2.
    let exponent = magnitude >> 23;
    let index = (magnitude % (2 * ONE)) ^ ONE;
    // Powers of four are exact; the interpolation alone would fall one short.
    let result = match index {
        0 => 2 * ONE,
        _ => {
            let segment = &RSQRT[(index >> 17) as usize];
            interpolate(segment, index % (1 << 17), RSQRT_BIAS)
        }
    };
    // Exponent 126 - k, biased, where k = floor((e - 127) / 2).
    f32::from_bits(((190 - exponent.div_ceil(2)) << 23) + (result - ONE))
}

/// The coefficients of one segment: `C0` in quarters of the result's last place, `C1` for an
/// argument of 17 bits in units of 2^-16, `C2` for the squarer's output in units of 2^-15.
struct Segment(i32, i32, i32);

/// The 24-bit significand at `xl`, the 17 bits of the reduced argument below the segment's index.
fn interpolate(&Segment(c0, c1, c2): &Segment, xl: u32, bias: i64) -> u32 {
    let linear = i64::from(c1) * i64::from(xl);
    let quadratic = i64::from(c2 * square(xl) as i32);
    (((i64::from(c0) << 14) + linear + (quadratic << 1) + bias) >> 16) as u32
}

/// `xl^2 >> 19` by a squarer that leaves out the partial products of the 19 lowest columns: the
/// sum over bits `i < j` of `xl_i xl_j 2^(i+j+1)` and over `i` of `xl_i 2^(2i)`, where those
/// exponents are 19 or more.
fn square(xl: u32) -> u32 {
    // Of the products among bits 9 to 16 only the square of bit 9 is left out, by the shift.
    let high = xl >> 9;
    let low = (2..9).map(|i| ((xl >> i) & 1) * (xl >> (18 - i)));
    ((high * high) >> 1) + low.sum::<u32>()
}

/// `2^f` for `f` in `[0, 1)`, by the top 6 bits of `f`.
#[rustfmt::skip]
const EX2: [Segment; 64] = [
    Segment(33554435, 45426, 494), Segment(33919818, 45920, 501), Segment(34289182, 46420, 506), Segment(34662565, 46926, 511),
    Segment(35040018, 47436, 518), Segment(35421577, 47954, 521), Segment(35807292, 48476, 527), Segment(36197209, 49004, 532),
    Segment(36591372, 49536, 541), Segment(36989825, 50076, 546), Segment(37392616, 50622, 551), Segment(37799797, 51172, 559),
    Segment(38211409, 51730, 564), Segment(38627504, 52294, 568), Segment(39048131, 52862, 577), Segment(39473337, 53438, 583),
    Segment(39903173, 54020, 589), Segment(40337690, 54608, 596), Segment(40776937, 55204, 600), Segment(41220970, 55804, 609),
    Segment(41669836, 56412, 615), Segment(42123592, 57026, 622), Segment(42582286, 57648, 627), Segment(43045977, 58276, 633),
    Segment(43514717, 58910, 641), Segment(43988561, 59552, 647), Segment(44467565, 60200, 655), Segment(44951786, 60856, 661),
    Segment(45441278, 61518, 670), Segment(45936101, 62188, 677), Segment(46436314, 62864, 686), Segment(46941971, 63550, 691),
    Segment(47453135, 64242, 699), Segment(47969867, 64942, 705), Segment(48492225, 65648, 715), Segment(49020269, 66364, 721),
    Segment(49554065, 67086, 730), Segment(50093674, 67816, 739), Segment(50639159, 68554, 748), Segment(51190582, 69302, 753),
    Segment(51748011, 70056, 763), Segment(52311510, 70818, 773), Segment(52881146, 71590, 779), Segment(53456983, 72370, 787),
    Segment(54039091, 73158, 796), Segment(54627538, 73954, 806), Segment(55222393, 74760, 813), Segment(55823725, 75574, 822),
    Segment(56431607, 76396, 833), Segment(57046106, 77228, 842), Segment(57667297, 78070, 849), Segment(58295254, 78920, 858),
    Segment(58930048, 79778, 870), Segment(59571754, 80648, 877), Segment(60220447, 81526, 887), Segment(60876205, 82414, 896),
    Segment(61539104, 83310, 909), Segment(62209220, 84218, 917), Segment(62886634, 85136, 925), Segment(63571424, 86062, 938),
    Segment(64263672, 87000, 946), Segment(64963458, 87946, 959), Segment(65670863, 88904, 969), Segment(66385972, 89872, 980),
];

/// `1 / m` for `m` in `[1, 2)`, by the top 7 bits of the fraction of `m`.
#[rustfmt::skip]
const RCP: [Segment; 128] = [
    Segment(67108864, -65534, 1013), Segment(66588642, -64522, 989), Segment(66076422, -63533, 966), Segment(65572021, -62567, 945),
    Segment(65075262, -61622, 923), Segment(64585976, -60699, 902), Segment(64103992, -59797, 883), Segment(63629146, -58914, 863),
    Segment(63161284, -58051, 845), Segment(62700254, -57207, 827), Segment(62245905, -56381, 809), Segment(61798091, -55572, 791),
    Segment(61356677, -54781, 774), Segment(60921524, -54007, 758), Segment(60492499, -53249, 742), Segment(60069474, -52507, 727),
    Segment(59652325, -51780, 711), Segment(59240930, -51068, 696), Segment(58835170, -50371, 682), Segment(58434930, -49688, 669),
    Segment(58040099, -49019, 656), Segment(57650569, -48363, 642), Segment(57266231, -47721, 631), Segment(56886986, -47091, 618),
    Segment(56512729, -46473, 605), Segment(56143366, -45868, 594), Segment(55778798, -45274, 582), Segment(55418934, -44692, 572),
    Segment(55063686, -44121, 561), Segment(54712961, -43560, 549), Segment(54366677, -43011, 540), Segment(54024747, -42471, 529),
    Segment(53687093, -41942, 519), Segment(53353633, -41423, 510), Segment(53024288, -40913, 501), Segment(52698987, -40412, 490),
    Segment(52377651, -39921, 482), Segment(52060212, -39439, 474), Segment(51746596, -38965, 465), Segment(51436737, -38500, 457),
    Segment(51130565, -38043, 449), Segment(50828017, -37594, 441), Segment(50529029, -37153, 433), Segment(50233538, -36720, 426),
    Segment(49941482, -36294, 418), Segment(49652803, -35876, 412), Segment(49367442, -35464, 403), Segment(49085342, -35060, 397),
    Segment(48806449, -34663, 390), Segment(48530705, -34272, 383), Segment(48258060, -33888, 377), Segment(47988464, -33511, 371),
    Segment(47721861, -33140, 366), Segment(47458204, -32774, 358), Segment(47197444, -32415, 353), Segment(46939534, -32062, 348),
    Segment(46684429, -31714, 341), Segment(46432082, -31373, 337), Segment(46182446, -31036, 331), Segment(45935480, -30705, 326),
    Segment(45691143, -30379, 320), Segment(45449392, -30059, 316), Segment(45210185, -29743, 310), Segment(44973481, -29432, 305),
    Segment(44739244, -29127, 302), Segment(44507436, -28826, 297), Segment(44278016, -28529, 291), Segment(44050948, -28237, 287),
    Segment(43826199, -27950, 283), Segment(43603730, -27667, 279), Segment(43383510, -27388, 274), Segment(43165503, -27114, 271),
    Segment(42949675, -26843, 266), Segment(42735995, -26577, 263), Segment(42524430, -26314, 258), Segment(42314950, -26056, 256),
    Segment(42107525, -25801, 251), Segment(41902122, -25550, 248), Segment(41698714, -25302, 243), Segment(41497270, -25058, 240),
    Segment(41297764, -24818, 237), Segment(41100168, -24581, 233), Segment(40904453, -24348, 231), Segment(40710593, -24117, 226),
    Segment(40518561, -23890, 223), Segment(40328333, -23667, 222), Segment(40139883, -23446, 218), Segment(39953186, -23228, 214),
    Segment(39768218, -23014, 212), Segment(39584955, -22802, 208), Segment(39403371, -22593, 205), Segment(39223448, -22388, 204),
    Segment(39045159, -22184, 199), Segment(38868484, -21984, 197), Segment(38693401, -21787, 196), Segment(38519888, -21592, 193),
    Segment(38347924, -21399, 189), Segment(38177489, -21209, 186), Segment(38008563, -21022, 184), Segment(37841123, -20837, 182),
    Segment(37675154, -20655, 180), Segment(37510633, -20475, 178), Segment(37347543, -20297, 175), Segment(37185866, -20122, 173),
    Segment(37025582, -19949, 171), Segment(36866673, -19778, 169), Segment(36709124, -19609, 166), Segment(36552915, -19443, 165),
    Segment(36398030, -19278, 161), Segment(36244452, -19116, 160), Segment(36092164, -18956, 159), Segment(35941151, -18797, 155),
    Segment(35791396, -18641, 154), Segment(35642884, -18487, 153), Segment(35495599, -18334, 150), Segment(35349528, -18184, 149),
    Segment(35204652, -18035, 147), Segment(35060959, -17888, 145), Segment(34918436, -17743, 143), Segment(34777064, -17600, 143),
    Segment(34636835, -17458, 140), Segment(34497732, -17318, 138), Segment(34359741, -17180, 137), Segment(34222849, -17043, 135),
    Segment(34087044, -16908, 133), Segment(33952313, -16775, 132), Segment(33818641, -16643, 131), Segment(33686019, -16513, 130),
];

/// `1 / sqrt(m)` for `m` in `[1, 4)`, by exponent parity and the top 6 fraction bits.
#[rustfmt::skip]
const RSQRT: [Segment; 128] = [
    Segment(67108862, -65531, 1508), Segment(66590638, -64024, 1450), Segment(66084240, -62575, 1396), Segment(65589220, -61179, 1344),
    Segment(65105161, -59835, 1296), Segment(64631662, -58539, 1250), Segment(64168346, -57289, 1206), Segment(63714854, -56083, 1164),
    Segment(63270844, -54919, 1124), Segment(62835987, -53794, 1086), Segment(62409973, -52708, 1052), Segment(61992512, -51657, 1016),
    Segment(61583315, -50641, 984), Segment(61182119, -49658, 952), Segment(60788660, -48706, 922), Segment(60402697, -47784, 892),
    Segment(60023991, -46891, 866), Segment(59652324, -46026, 840), Segment(59287473, -45186, 814), Segment(58929238, -44372, 790),
    Segment(58577419, -43582, 766), Segment(58231826, -42815, 744), Segment(57892278, -42071, 724), Segment(57558602, -41348, 704),
    Segment(57230630, -40645, 684), Segment(56908204, -39962, 664), Segment(56591164, -39298, 646), Segment(56279365, -38652, 628),
    Segment(55972663, -38023, 610), Segment(55670921, -37412, 596), Segment(55374005, -36816, 580), Segment(55081793, -36237, 566),
    Segment(54794159, -35672, 550), Segment(54510984, -35122, 536), Segment(54232151, -34586, 524), Segment(53957557, -34063, 510),
    Segment(53687092, -33553, 496), Segment(53420653, -33056, 484), Segment(53158143, -32571, 472), Segment(52899462, -32098, 462),
    Segment(52644525, -31636, 450), Segment(52393235, -31185, 440), Segment(52145512, -30745, 430), Segment(51901270, -30315, 420),
    Segment(51660428, -29895, 410), Segment(51422907, -29485, 402), Segment(51188635, -29084, 392), Segment(50957533, -28691, 382),
    Segment(50729535, -28308, 374), Segment(50504568, -27933, 366), Segment(50282568, -27566, 358), Segment(50063471, -27208, 352),
    Segment(49847214, -26857, 344), Segment(49633734, -26513, 336), Segment(49422974, -26177, 330), Segment(49214875, -25848, 324),
    Segment(49009385, -25525, 316), Segment(48806448, -25209, 308), Segment(48606011, -24900, 302), Segment(48408022, -24597, 296),
    Segment(48212433, -24300, 290), Segment(48019193, -24009, 286), Segment(47828263, -23724, 280), Segment(47639590, -23444, 274),
    Segment(47453130, -46337, 1066), Segment(47086691, -45272, 1026), Segment(46728615, -44247, 986), Segment(46378582, -43260, 950),
    Segment(46036299, -42310, 918), Segment(45701485, -41393, 884), Segment(45373874, -40510, 854), Segment(45053205, -39657, 824),
    Segment(44739243, -38834, 796), Segment(44431752, -38038, 768), Segment(44130518, -37270, 742), Segment(43835326, -36527, 718),
    Segment(43545982, -35809, 696), Segment(43262291, -35113, 672), Segment(42984072, -34440, 652), Segment(42711158, -33789, 632),
    Segment(42443372, -33157, 612), Segment(42180562, -32545, 594), Segment(41922577, -31952, 576), Segment(41669266, -31376, 558),
    Segment(41420490, -30817, 542), Segment(41176120, -30275, 526), Segment(40936024, -29749, 512), Segment(40700080, -29237, 496),
    Segment(40468168, -28740, 482), Segment(40240175, -28257, 470), Segment(40015994, -27788, 458), Segment(39795521, -27331, 444),
    Segment(39578648, -26887, 434), Segment(39365287, -26454, 420), Segment(39155336, -26033, 410), Segment(38948712, -25623, 398),
    Segment(38745320, -25224, 390), Segment(38545085, -24835, 380), Segment(38347924, -24456, 370), Segment(38153755, -24086, 360),
    Segment(37962507, -23726, 352), Segment(37774106, -23374, 342), Segment(37588483, -23031, 334), Segment(37405571, -22697, 326),
    Segment(37225301, -22370, 318), Segment(37047614, -22051, 310), Segment(36872446, -21740, 304), Segment(36699742, -21436, 296),
    Segment(36529439, -21139, 290), Segment(36361487, -20849, 284), Segment(36195832, -20565, 276), Segment(36032416, -20288, 272),
    Segment(35871196, -20017, 266), Segment(35712122, -19752, 260), Segment(35555147, -19492, 252), Segment(35400222, -19239, 248),
    Segment(35247303, -18991, 244), Segment(35096352, -18748, 238), Segment(34947319, -18510, 234), Segment(34800173, -18277, 228),
    Segment(34654868, -18049, 224), Segment(34511369, -17826, 220), Segment(34369640, -17607, 214), Segment(34229641, -17393, 210),
    Segment(34091339, -17183, 206), Segment(33954698, -16977, 202), Segment(33819688, -16775, 198), Segment(33686280, -16578, 194),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs spread over all bit patterns: every exponent, both signs.
    fn inputs() -> impl Iterator<Item = f32> {
        (0..u32::MAX / 40_503).map(|index| f32::from_bits(index * 40_503))
    }

    /// Units in the last place between two numbers of one sign.
    fn ulps(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    /// The bounds that the PTX ISA documents, against f64.
    #[test]
    fn results_are_within_the_documented_error() {
        type Case = (fn(f32) -> f32, fn(f64) -> f64, u32);
        let functions: [Case; 3] = [
            (ex2_approx_ftz, f64::exp2, 2),
            (rcp_approx_ftz, |x| 1.0 / x, 1),
            (rsqrt_approx_ftz, |x| 1.0 / x.sqrt(), 2),
        ];
        for (function, exact, limit) in functions {
            for x in inputs().filter(|x| x.is_normal()) {
                let (found, expected) = (function(x), exact(f64::from(x)) as f32);
                if expected.is_normal() {
                    assert!(ulps(found, expected) <= limit, "{x:e}: {found:e} where {expected:e} is exact");
                } else if expected.is_nan() {
                    assert_eq!(found.to_bits(), NAN);
                } else if expected.is_subnormal() {
                    assert!(
                        found == 0.0 || ulps(found, f32::MIN_POSITIVE.copysign(found)) <= limit,
                        "{x:e}: {found:e}"
                    );
                } else {
                    assert_eq!(found, expected, "{x:e}");
                }
            }
        }
    }

    /// What an H200 gave for these inputs, all folded into one number: a change of any table shows without a GPU.
    #[test]
    fn results_are_those_of_the_hardware() {
        let fold = |function: fn(f32) -> f32| {
            inputs().fold(0u64, |sum, x| {
                (sum ^ u64::from(function(x).to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
            })
        };
        assert_eq!(
            [fold(ex2_approx_ftz), fold(rcp_approx_ftz), fold(rsqrt_approx_ftz)],
            [0xca17_82a9_8de2_ab26, 0x915d_3266_3147_0fda, 0x5acd_277c_082d_2f0c]
        );
    }
}
