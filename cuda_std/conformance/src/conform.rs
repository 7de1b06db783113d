/// A table of cases and their kernels.
///
/// An entry is `name(covers = [..], expects = [..], in = [type; n], out = [type; n], ..) |io| { body }`: the functions
/// that it is the test of, the words that its PTX must hold, the row of a thread in the input and in the output, and more
/// fields of [`Case`](crate::Case) where they differ from the usual. The body is the kernel; `io` is its `kernel::Io`.
///
/// `sm_90 TABLE: ..` is a table of kernels that need what came with Hopper, `sm_90a TABLE: ..` one of kernels that need what is Hopper's
/// alone. They are all that the modules of such architectures hold.
macro_rules! conform {
    (sm_90 $($rest:tt)*) => {
        conform! { (Sm90, any(not(target_arch = "nvptx64"), sm_90)) $($rest)* }
    };
    (sm_90a $($rest:tt)*) => {
        conform! { (Sm90a, any(not(target_arch = "nvptx64"), sm_90a)) $($rest)* }
    };
    ($table:ident: $($rest:tt)*) => {
        conform! { (Sm80, not(sm_90)) $table: $($rest)* }
    };
    (($needs:ident, $built:meta) $table:ident: $(
        $name:ident(
            covers = [$($covers:expr),* $(,)?],
            expects = [$($expects:expr),* $(,)?],
            in = [$in:ty; $ins:expr],
            out = [$out:ty; $outs:expr]
            $(, $field:ident = $value:expr)* $(,)?
        ) |$io:ident| $body:block
    )*) => {
        #[cfg(not(target_arch = "nvptx64"))]
        pub(crate) const $table: &[crate::Case] = {
            #[allow(unused_imports, reason = "some tables have only u32")]
            use crate::case::types::*;
            &[$(
                crate::Case {
                    name: stringify!($name),
                    covers: &[$($covers),*],
                    expects: &[$($expects),*],
                    in_words: crate::case::words(size_of::<[$in; $ins]>()),
                    out_words: crate::case::words(size_of::<[$out; $outs]>()),
                    $($field: $value,)*
                    needs: crate::Needs::$needs,
                    #[cfg(feature = "emulate")]
                    kernel: crate::emulate::kernel!($name, $in, $out),
                    ..crate::case::USUAL
                }
            ),*]
        };

        #[cfg(all($built, any(target_arch = "nvptx64", feature = "emulate")))]
        pub(crate) mod kernels {
            #[allow(unused_imports, reason = "no subject needs all of it")]
            use crate::kernel::*;
            $(
                #[kernel]
                pub unsafe fn $name(input: Global<$in>, output: GlobalMut<$out>) {
                    let $io = Io::new(input, output, $ins, $outs);
                    $body
                }
            )*
        }
    };
}
