//! No public function of `cuda_std` is without a case.
//!
//! The functions are read from the sources. Those that macros make are found in the macro's definition, which names them,
//! or in its invocation; a macro that this test does not know is a failure, so that a new one is not overlooked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cuda_std_conformance::CASES;
use proc_macro2::{TokenStream, TokenTree};
use syn::{ImplItem, Item, ItemMacro, Visibility};

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../src")
}

/// Without the types that tell cases of one function apart: `view::Global<u8>::load` is `view::Global::load`.
fn function_of(covered: &str) -> String {
    match (covered.find('<'), covered.find('>')) {
        (Some(start), Some(end)) => format!("{}{}", &covered[..start], &covered[end + 1..]),
        _ => covered.to_owned(),
    }
}

fn covered() -> BTreeSet<String> {
    CASES.iter().flat_map(|case| case.covers).map(|covered| function_of(covered)).collect()
}

#[test]
fn every_public_function_has_a_case() {
    let public = public_functions();
    assert!(public.len() > 90, "so few public functions: {public:?}");
    let covered = covered();
    let missing: Vec<_> = public.difference(&covered).collect();
    assert!(missing.is_empty(), "no case covers {missing:?}");
}

#[test]
fn every_case_covers_something_that_exists() {
    let (public, variants) = (public_functions(), variants());
    let unknown: Vec<_> =
        covered().into_iter().filter(|name| !public.contains(name) && !variants.contains(name)).collect();
    assert!(unknown.is_empty(), "cases cover {unknown:?}, which cuda_std does not have");
}

/// Each way of caching is a wrapper of its own; so are orders and scopes, which the test of the PTX has.
#[test]
fn every_cache_hint_and_fence_has_a_case() {
    let covered = covered();
    let wanted = ["view::LoadCache", "view::StoreCache", "atomic::Fence", "atomic::Scope"];
    let of_these = |name: &String| {
        wanted.iter().any(|of| name.strip_prefix(of).is_some_and(|rest| rest.starts_with("::")))
    };
    let variants: BTreeSet<String> = variants().into_iter().filter(of_these).collect();
    assert_eq!(variants.len(), 6 + 3 + 2 + 3);
    let missing: Vec<_> = variants.difference(&covered).collect();
    assert!(missing.is_empty(), "no case covers {missing:?}");
}

#[test]
fn every_type_has_a_case_of_each_function_that_is_made_for_it() {
    let implementations = |file: &str, of: &str| -> Vec<String> {
        let types: Vec<String> = items(file).into_iter().filter_map(|item| implemented(&item, of)).collect();
        assert!(!types.is_empty(), "no type implements {of} in {file}");
        types
    };
    let mut values = implementations("value.rs", "Value");
    values.extend(macro_types("value.rs", "plain"));
    assert_eq!(values.len(), 11, "{values:?}");
    let mut shuffled = implementations("warp.rs", "ShuffleValue");
    shuffled.extend(macro_types("warp.rs", "shuffle_value"));
    assert_eq!(shuffled.len(), 4, "{shuffled:?}");
    let matched = macro_types("warp.rs", "match_value");
    assert_eq!(matched.len(), 2, "{matched:?}");

    let mut wanted = BTreeSet::new();
    let mut want = |types: &[String], functions: &[&str]| {
        for (ty, function) in types.iter().flat_map(|ty| functions.iter().map(move |function| (ty, function)))
        {
            wanted.insert(function.replace("<T>", &format!("<{ty}>")));
        }
    };
    want(
        &values,
        &[
            "view::Global<T>::load",
            "view::GlobalMut<T>::load",
            "view::GlobalMut<T>::store",
            "view::Shared<T>::load",
            "view::Shared<T>::store",
        ],
    );
    want(
        &shuffled,
        &[
            "warp::warp_shuffle_idx<T>",
            "warp::warp_shuffle_xor<T>",
            "warp::warp_shuffle_up<T>",
            "warp::warp_shuffle_down<T>",
        ],
    );
    want(&matched, &["warp::warp_match_any<T>", "warp::warp_match_all<T>"]);
    want(&implementations("copy.rs", "CopyValue"), &["copy::copy_async<T>", "copy::copy_async_or_zero<T>"]);
    want(
        &implementations("atomic.rs", "AtomicValue"),
        &[
            "atomic::Global<T>::atomic_load",
            "atomic::GlobalMut<T>::atomic_load",
            "atomic::GlobalMut<T>::atomic_store",
            "atomic::GlobalMut<T>::atomic_add",
            "atomic::Shared<T>::atomic_load",
            "atomic::Shared<T>::atomic_store",
            "atomic::Shared<T>::atomic_add",
        ],
    );
    let integer = ["min", "max", "and", "or", "xor", "exchange", "compare_exchange"];
    for view in ["GlobalMut", "Shared"] {
        let functions: Vec<String> =
            integer.iter().map(|op| format!("atomic::{view}<T>::atomic_{op}")).collect();
        let functions: Vec<&str> = functions.iter().map(String::as_str).collect();
        want(&implementations("atomic.rs", "AtomicInteger"), &functions);
    }

    let covered: BTreeSet<String> =
        CASES.iter().flat_map(|case| case.covers).map(|covered| covered.to_string()).collect();
    let missing: Vec<_> = wanted.difference(&covered).collect();
    assert!(missing.is_empty(), "no case covers {missing:?}");
}

/// The facade's files, with their modules' names.
fn files() -> Vec<(String, PathBuf)> {
    let entries =
        std::fs::read_dir(sources()).expect("the sources").map(|entry| entry.expect("an entry").path());
    let rust = entries.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    rust.map(|path| (path.file_stem().expect("a name").to_string_lossy().into_owned(), path)).collect()
}

fn items(file: &str) -> Vec<Item> {
    let text = std::fs::read_to_string(sources().join(file)).expect("a source");
    syn::parse_file(&text).expect("Rust").items
}

/// All public functions, as `module::function` or `module::Type::function`, and exported macros.
fn public_functions() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (module, path) in files() {
        let items = items(path.file_name().expect("a name").to_str().expect("a plain name"));
        let definitions: Vec<&ItemMacro> = items
            .iter()
            .filter_map(|item| match item {
                Item::Macro(definition) if definition.ident.is_some() => Some(definition),
                _ => None,
            })
            .collect();
        for item in &items {
            match item {
                Item::Fn(function) if is_public(&function.vis) => {
                    found.insert(format!("{module}::{}", function.sig.ident));
                }
                Item::Impl(block) if block.trait_.is_none() => {
                    let ty = name_of(&block.self_ty);
                    for item in &block.items {
                        if let ImplItem::Fn(function) = item
                            && is_public(&function.vis)
                        {
                            found.insert(format!("{module}::{ty}::{}", function.sig.ident));
                        }
                    }
                }
                Item::Mod(inner) => {
                    assert!(
                        inner.content.is_none(),
                        "a module within {module}: teach this test to look into it"
                    );
                }
                Item::Macro(item) => match &item.ident {
                    None => found.extend(of_invocation(&module, item, &definitions)),
                    Some(name) => {
                        let exported = |attribute: &syn::Attribute| attribute.path().is_ident("macro_export");
                        found.extend(item.attrs.iter().any(exported).then(|| format!("{name}!")));
                    }
                },
                _ => {}
            }
        }
    }
    found
}

/// The functions that a macro's invocation makes.
fn of_invocation(module: &str, invocation: &ItemMacro, definitions: &[&ItemMacro]) -> Vec<String> {
    let name = invocation.mac.path.segments.last().expect("a name").ident.to_string();
    let arguments: Vec<TokenTree> = invocation.mac.tokens.clone().into_iter().collect();
    let first = || arguments.first().expect("an argument").to_string();
    let of_first = |types: Vec<String>| {
        let functions = named_functions(&definition_of(definitions, &name));
        assert!(!functions.is_empty(), "{name}! names no function");
        types
            .iter()
            .flat_map(|ty| functions.iter().map(move |function| format!("{module}::{ty}::{function}")))
            .collect()
    };
    match (module, name.as_str()) {
        // `name = "register";` each.
        ("thread", "index") => {
            let names = arguments.windows(2).filter_map(|two| match two {
                [TokenTree::Ident(name), TokenTree::Punct(equals)] if equals.as_char() == '=' => {
                    Some(name.to_string())
                }
                _ => None,
            });
            names.map(|name| format!("{module}::{name}")).collect()
        }
        // Methods of the view that comes first.
        ("atomic", "atomics") | ("view", "reading" | "writing") => of_first(vec![first()]),
        // Methods of the view and of its rows: `rows` and `row`.
        ("view", "rows") => {
            let functions = named_functions(&definition_of(definitions, &name));
            assert_eq!(functions, ["rows", "row"]);
            vec![format!("{module}::{}::rows", first()), format!("{module}::{}::row", arguments[2])]
        }
        // Modules behind a cfg, read as files of their own; and implementations of traits.
        ("lib", "with_a_face")
        | ("view", "copyable")
        | ("value", "plain")
        | ("warp", "shuffle_value" | "match_value") => {
            assert!(
                named_functions(&invocation.mac.tokens).is_empty(),
                "{name}! in {module} now has functions"
            );
            Vec::new()
        }
        _ => panic!("{name}! in {module} is new: say here which functions it makes"),
    }
}

fn definition_of(definitions: &[&ItemMacro], name: &str) -> TokenStream {
    let definition =
        definitions.iter().find(|definition| definition.ident.as_ref().is_some_and(|ident| ident == name));
    definition.unwrap_or_else(|| panic!("{name}! is defined elsewhere")).mac.tokens.clone()
}

/// The functions that tokens name: `pub [unsafe] fn name`, and what stands before a colon in `rmw! { name: Op; .. }`.
fn named_functions(tokens: &TokenStream) -> Vec<String> {
    let mut found = Vec::new();
    let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
    let text: Vec<String> = tokens.iter().map(TokenTree::to_string).collect();
    for (at, token) in tokens.iter().enumerate() {
        let before = |distance: usize| at.checked_sub(distance).map(|at| text[at].as_str());
        match token {
            TokenTree::Ident(name)
                if before(1) == Some("fn")
                    && (before(2) == Some("pub")
                        || (before(2) == Some("unsafe") && before(3) == Some("pub"))) =>
            {
                found.push(name.to_string());
            }
            TokenTree::Group(group) if before(1) == Some("!") && before(2) == Some("rmw") => {
                let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                found.extend(inner.windows(3).filter_map(|three| match three {
                    [TokenTree::Ident(name), TokenTree::Punct(colon), TokenTree::Ident(_)]
                        if colon.as_char() == ':' =>
                    {
                        Some(name.to_string())
                    }
                    _ => None,
                }));
            }
            TokenTree::Group(group) => found.extend(named_functions(&group.stream())),
            _ => {}
        }
    }
    found
}

/// The variants of public enums, as `module::Enum::Variant`.
fn variants() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (module, path) in files() {
        for item in items(path.file_name().expect("a name").to_str().expect("a plain name")) {
            if let Item::Enum(item) = item
                && is_public(&item.vis)
            {
                found.extend(
                    item.variants
                        .iter()
                        .map(|variant| format!("{module}::{}::{}", item.ident, variant.ident)),
                );
            }
        }
    }
    found
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// A type's own name, without path and parameters.
fn name_of(ty: &syn::Type) -> String {
    match ty {
        syn::Type::Path(path) => path.path.segments.last().expect("a name").ident.to_string(),
        _ => panic!("functions of a type without a name"),
    }
}

/// The type that `item` implements the trait `of` for, if it does.
fn implemented(item: &Item, of: &str) -> Option<String> {
    let Item::Impl(block) = item else { return None };
    let (_, path, _) = block.trait_.as_ref()?;
    path.segments.last()?.ident.eq(of).then(|| name_of(&block.self_ty))
}

/// The types in the invocation of `name!`: identifiers at the start or after a comma or semicolon that name a number.
fn macro_types(file: &str, name: &str) -> Vec<String> {
    let invocation = items(file).into_iter().find_map(|item| match item {
        Item::Macro(item) if item.ident.is_none() && item.mac.path.is_ident(name) => Some(item.mac.tokens),
        _ => None,
    });
    let numbers = ["u8", "u16", "u32", "u64", "u128", "i8", "i16", "i32", "i64", "i128", "f32", "f64"];
    let mut starts = true;
    let mut types = Vec::new();
    for token in invocation.unwrap_or_else(|| panic!("no {name}! in {file}")) {
        let token = token.to_string();
        if starts && numbers.contains(&token.as_str()) {
            types.push(token.clone());
        }
        starts = matches!(token.as_str(), "," | ";");
    }
    types
}
