//! What the driver cannot be asked before CUDA 12.4: the parameters of a module's kernels, out of its text.

use std::collections::HashMap;

/// The bytes of each parameter of each kernel in a PTX text, by the kernel's name. Kernels with parameters that are not
/// understood are left out.
pub(super) fn kernel_parameters(text: &str) -> HashMap<String, Vec<usize>> {
    let mut kernels = HashMap::new();
    for (entry, _) in text.match_indices(".entry") {
        let signature = text[entry + ".entry".len()..].trim_start();
        let name_len =
            signature.find(|c: char| c.is_whitespace() || "({".contains(c)).unwrap_or(signature.len());
        let (name, rest) = signature.split_at(name_len);
        // A kernel without parameters may have no list at all.
        let list = rest.trim_start().strip_prefix('(').and_then(|list| list.split_once(')'));
        let parameters = list.map_or("", |(parameters, _)| parameters).split(',').map(str::trim);
        let sizes: Option<Vec<usize>> =
            parameters.filter(|parameter| !parameter.is_empty()).map(parameter_bytes).collect();
        if let Some(sizes) = sizes {
            kernels.insert(name.to_owned(), sizes);
        }
    }
    kernels
}

/// `.param .u64 .ptr .align 1 name` has 8 bytes, `.param .align 8 .b8 name[16]` has 16.
fn parameter_bytes(declaration: &str) -> Option<usize> {
    let mut words = declaration.split_whitespace();
    let element = words.find_map(element_bytes)?;
    let name = words.last()?;
    let elements = match name.split_once('[') {
        Some((_, count)) => count.strip_suffix(']')?.parse().ok()?,
        None => 1,
    };
    Some(element * elements)
}

/// `.u64` has 8 bytes; so have `.b64`, `.s64` and `.f64`.
fn element_bytes(word: &str) -> Option<usize> {
    let bits: usize = word.strip_prefix(['.'])?.strip_prefix(['b', 'u', 's', 'f'])?.parse().ok()?;
    Some(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_counted_and_measured() {
        let text = "
            .version 8.0
            .visible .entry gather(
                .param .u64 .ptr .global .align 16 gather_param_0,
                .param .u64 gather_param_1,
                .param .u32 gather_param_2, .param .f32 gather_param_3
            )
            .maxntid 128, 1, 1
            { ret; }
            .visible .entry nothing() { ret; }
            .visible .entry bare { ret; }
            .visible .entry by_value(.param .align 8 .b8 by_value_param_0[24]) { ret; }
            .visible .entry odd(.param .texref t) { ret; }
            .func helper(.param .b32 x) { ret; }";
        let kernels = kernel_parameters(text);
        assert_eq!(kernels["gather"], [8, 8, 4, 4]);
        assert_eq!(kernels["nothing"], []);
        assert_eq!(kernels["bare"], []);
        assert_eq!(kernels["by_value"], [24]);
        assert_eq!(kernels.len(), 4, "{kernels:?}");
    }
}
