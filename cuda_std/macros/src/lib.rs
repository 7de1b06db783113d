//! The `#[kernel]` attribute of `cuda_std`.

use proc_macro::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Error, Ident, ItemFn, LitInt, ReturnType, Token, Visibility, parenthesized, parse_macro_input};

/// Collectives that a kernel may declare; `cargo xtask check-kernels` counts the same words in the PTX.
const COLLECTIVES: [&str; 7] = ["barrier", "shuffle", "vote", "matching", "reduce", "mma", "wgmma"];

/// Makes a function a kernel.
///
/// On the device it becomes an entry of the PTX module under its own name; with the emulator it stays a plain function
/// that [`cuda_std::emulator`](../cuda_std/emulator/index.html) runs once a thread.
///
/// The function is `pub unsafe`, returns nothing and has no type parameters. Its parameters are views and scalars, each
/// passed on its own: pointers within structs, and slices, would be accessed through generic addresses.
///
/// `collectives(..)` declares how many warp and block collectives the kernel's PTX holds, loops unrolled: `barrier`,
/// `shuffle`, `vote`, `matching`, `reduce`, `mma`, `wgmma`. A compiler that duplicates or drops one then fails the check (that it
/// moves none is what their `convergent` mark is for).
///
/// `sm_90` says that the kernel needs an architecture that has what came with Hopper. It then stands behind
/// `cfg(any(not(target_arch = "nvptx64"), sm_90))`, which cuda_builder sets, and is checked for those architectures alone. `sm_90a` says
/// the same of what is Hopper's alone, the products of [`cuda_std::wgmma`](../cuda_std/wgmma/index.html).
///
/// ```ignore
/// #[kernel(collectives(shuffle = 5, barrier = 1))]
/// pub unsafe fn sum(values: Global<f32>, out: GlobalMut<f32>) { .. }
/// ```
#[proc_macro_attribute]
pub fn kernel(attributes: TokenStream, item: TokenStream) -> TokenStream {
    let _declared = parse_macro_input!(attributes as Declared);
    let function = parse_macro_input!(item as ItemFn);
    match check(&function) {
        Ok(()) => expand(&function).into(),
        Err(error) => error.to_compile_error().into(),
    }
}

fn expand(function: &ItemFn) -> proc_macro2::TokenStream {
    let ItemFn { attrs, vis, sig, block } = function;
    let name = sig.ident.to_string();
    let mut entry = sig.clone();
    entry.abi = Some(syn::parse_quote!(extern "ptx-kernel"));
    quote! {
        #[cfg(target_arch = "nvptx64")]
        #(#attrs)*
        #[unsafe(no_mangle)]
        #vis #entry #block

        #[cfg(not(target_arch = "nvptx64"))]
        #(#attrs)*
        #[allow(clippy::too_many_arguments, reason = "a kernel's parameters are passed one by one")]
        #vis #sig {
            ::cuda_std::emulator::enter_kernel(#name);
            #block
        }
    }
}

fn check(function: &ItemFn) -> Result<(), Error> {
    let sig = &function.sig;
    let fail = |span: proc_macro2::Span, what: &str| Err(Error::new(span, what));
    if !matches!(function.vis, Visibility::Public(_)) {
        return fail(sig.ident.span(), "a kernel is `pub`: the host launches it by name");
    }
    if sig.unsafety.is_none() {
        return fail(
            sig.ident.span(),
            "a kernel is `unsafe`: its launch must meet the contract that its doc states",
        );
    }
    if !matches!(sig.output, ReturnType::Default) {
        return fail(sig.ident.span(), "a kernel returns nothing: results go through a GlobalMut");
    }
    if !sig.generics.params.is_empty() {
        return fail(
            sig.ident.span(),
            "a kernel has no type parameters: its name in the PTX stands for one function",
        );
    }
    if sig.abi.is_some() || sig.asyncness.is_some() || sig.constness.is_some() {
        return fail(sig.ident.span(), "a kernel is a plain function: no `extern`, `async` or `const`");
    }
    if let Some(receiver) = sig.receiver() {
        return fail(receiver.self_token.span, "a kernel has no `self`");
    }
    Ok(())
}

/// `sm_90` or `sm_90a`, and `collectives(barrier = 1, shuffle = 5)`, either or nothing.
struct Declared;

impl Parse for Declared {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        Punctuated::<Word, Token![,]>::parse_terminated(input)?;
        Ok(Self)
    }
}

/// One of its words.
struct Word;

impl Parse for Word {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let word: Ident = input.parse()?;
        if word == "sm_90" || word == "sm_90a" {
            return Ok(Self);
        }
        if word != "collectives" {
            return Err(Error::new(
                word.span(),
                "known: sm_90, sm_90a, collectives(barrier = 1, shuffle = 5, ..)",
            ));
        }
        let counts;
        parenthesized!(counts in input);
        for count in Punctuated::<Count, Token![,]>::parse_terminated(&counts)? {
            if !COLLECTIVES.iter().any(|known| count.kind == known) {
                let known = COLLECTIVES.join(", ");
                return Err(Error::new(count.kind.span(), format!("collectives are: {known}")));
            }
        }
        Ok(Self)
    }
}

struct Count {
    kind: Ident,
}

impl Parse for Count {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let kind = input.parse()?;
        input.parse::<Token![=]>()?;
        input.parse::<LitInt>()?.base10_parse::<u32>()?;
        Ok(Self { kind })
    }
}
