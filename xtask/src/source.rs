//! Which kernels a crate's source has, and what each declares.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use cuda_builder::Arch;
use cuda_builder::ptx::Collectives;
use syn::parse::ParseStream;
use syn::{Attribute, Error, Ident, Item, LitInt, Token, parenthesized};

use crate::Outcome;

/// A function with the attribute `#[kernel]`.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file that it stands in.
    pub file: PathBuf,
    pub declared: Declared,
}

/// What an attribute says: `#[kernel(sm_90, collectives(shuffle = 5, barrier = 1))]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Declared {
    /// It is built for the architectures that have this, and not for others.
    pub needs: Needs,
    /// Kinds that are left out are 0.
    pub collectives: Collectives,
}

/// What a kernel needs of an architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Needs {
    #[default]
    Nothing,
    /// What came with Hopper.
    Sm90,
    /// What is Hopper's alone.
    Sm90a,
}

impl Needs {
    /// Whether `arch` has it.
    pub fn are_met_by(self, arch: Arch) -> bool {
        match self {
            Self::Nothing => true,
            Self::Sm90 => arch.has_sm_90(),
            Self::Sm90a => arch.has_wgmma(),
        }
    }
}

/// As the attribute spells it.
impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Sm90 => "sm_90",
            Self::Sm90a => "sm_90a",
        })
    }
}

/// The kernels in all `.rs` files of `folder` and folders in it, by name.
pub fn kernels_in(folder: &Path) -> Outcome<BTreeMap<String, Kernel>> {
    let mut kernels = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                for (name, declared) in kernels_of(&fs::read_to_string(&path)?).map_err(|error| {
                    let at = error.span().start();
                    format!("{}:{}:{}: {error}", path.display(), at.line, at.column + 1)
                })? {
                    let kernel = Kernel { file: path.clone(), declared };
                    if let Some(other) = kernels.insert(name.clone(), kernel) {
                        // Both would be the same symbol.
                        return Err(format!(
                            "kernel `{name}` stands in {} and in {}",
                            other.file.display(),
                            path.display()
                        )
                        .into());
                    }
                }
            }
        }
    }
    Ok(kernels)
}

/// The kernels of a source file.
fn kernels_of(source: &str) -> syn::Result<Vec<(String, Declared)>> {
    let mut found = Vec::new();
    let mut items = syn::parse_file(source)?.items;
    while let Some(item) = items.pop() {
        match item {
            Item::Mod(module) => items.extend(module.content.into_iter().flat_map(|(_, items)| items)),
            Item::Fn(function) => {
                let is_kernel = |attribute: &&Attribute| {
                    attribute.path().segments.last().is_some_and(|segment| segment.ident == "kernel")
                };
                if let Some(attribute) = function.attrs.iter().find(is_kernel) {
                    found.push((function.sig.ident.to_string(), declared(attribute)?));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn declared(attribute: &Attribute) -> syn::Result<Declared> {
    let mut declared = Declared::default();
    if matches!(attribute.meta, syn::Meta::Path(_)) {
        return Ok(declared);
    }
    attribute.parse_args_with(|arguments: ParseStream<'_>| {
        while !arguments.is_empty() {
            let word: Ident = arguments.parse()?;
            if word == "sm_90" {
                declared.needs = Needs::Sm90;
            } else if word == "sm_90a" {
                declared.needs = Needs::Sm90a;
            } else if word == "collectives" {
                let kinds;
                parenthesized!(kinds in arguments);
                collectives(&kinds, &mut declared.collectives)?;
            } else {
                return Err(Error::new(
                    word.span(),
                    "only `sm_90`, `sm_90a` and `collectives(..)` are known here",
                ));
            }
            if !arguments.is_empty() {
                arguments.parse::<Token![,]>()?;
            }
        }
        Ok(())
    })?;
    Ok(declared)
}

/// `shuffle = 5, barrier = 1`.
fn collectives(kinds: ParseStream<'_>, collectives: &mut Collectives) -> syn::Result<()> {
    while !kinds.is_empty() {
        let kind: Ident = kinds.parse()?;
        let count = collectives.of_kind(&kind.to_string()).ok_or_else(|| {
            let known = Collectives::default().by_kind().map(|(name, _)| name).join(", ");
            Error::new(kind.span(), format!("no kind of collective; known are {known}"))
        })?;
        kinds.parse::<Token![=]>()?;
        *count = kinds.parse::<LitInt>()?.base10_parse()?;
        if !kinds.is_empty() {
            kinds.parse::<Token![,]>()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_what_they_declare_are_found() {
        let source = "
            use cuda_std::kernel;
            #[kernel]
            pub unsafe fn plain(x: Global<f32>) {}
            mod inner {
                /// Docs.
                #[cuda_std::kernel(collectives(shuffle = 5, barrier = 1))]
                #[allow(clippy::too_many_arguments)]
                pub unsafe fn sums(x: Global<f32>) {}
            }
            #[kernel(collectives())]
            pub unsafe fn none() {}
            #[kernel(sm_90, collectives(barrier = 2))]
            pub unsafe fn bulk() {}
            #[kernel(sm_90)]
            pub unsafe fn bare() {}
            #[kernel(sm_90a, collectives(wgmma = 4))]
            pub unsafe fn hopper() {}
            #[inline]
            fn helper() {}
        ";
        let mut kernels = kernels_of(source).unwrap();
        kernels.sort_by(|one, other| one.0.cmp(&other.0));
        let sums = Collectives { shuffle: 5, barrier: 1, ..Collectives::default() };
        let barriers = Collectives { barrier: 2, ..Collectives::default() };
        let products = Collectives { wgmma: 4, ..Collectives::default() };
        let expected = [
            ("bare", Needs::Sm90, Collectives::default()),
            ("bulk", Needs::Sm90, barriers),
            ("hopper", Needs::Sm90a, products),
            ("none", Needs::Nothing, Collectives::default()),
            ("plain", Needs::Nothing, Collectives::default()),
            ("sums", Needs::Nothing, sums),
        ];
        let expected =
            expected.map(|(name, needs, collectives)| (name.to_owned(), Declared { needs, collectives }));
        assert_eq!(kernels, expected);
    }

    #[test]
    fn wrong_declarations_are_refused() {
        for (attribute, says) in [
            (
                "#[kernel(collectives(shuffles = 5))]",
                "known are shuffle, barrier, vote, matching, reduce, mma, wgmma",
            ),
            ("#[kernel(collective(shuffle = 5))]", "only `sm_90`, `sm_90a` and `collectives(..)` are known"),
            ("#[kernel(collectives(shuffle = many))]", "expected integer literal"),
        ] {
            let error = kernels_of(&format!("{attribute} pub unsafe fn k() {{}}")).unwrap_err();
            assert!(error.to_string().contains(says), "{attribute}: {error}");
        }
    }

    #[test]
    fn a_name_stands_for_one_kernel() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("retrieve")).unwrap();
        fs::write(folder.path().join("lib.rs"), "#[kernel] pub unsafe fn gather() {}").unwrap();
        fs::write(folder.path().join("retrieve/notes.txt"), "not Rust").unwrap();
        assert_eq!(kernels_in(folder.path()).unwrap().len(), 1);
        fs::write(folder.path().join("retrieve/gather.rs"), "#[kernel] pub unsafe fn gather() {}").unwrap();
        let error = kernels_in(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("kernel `gather` stands in"), "{error}");
        fs::write(folder.path().join("retrieve/gather.rs"), "pub fn broken(").unwrap();
        let error = kernels_in(folder.path()).unwrap_err().to_string();
        assert!(error.contains("gather.rs:1:"), "{error}");
    }
}
