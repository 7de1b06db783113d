//! A kernel's panic is its fault, not the process's.

use std::any::Any;
use std::panic::{self, Location, PanicHookInfo};
use std::sync::Once;

use super::fault::FaultKind;
use super::machine::{Site, is_in_kernel, with};

/// Wraps the panic hook, once: panics of kernels are noted as faults and not printed.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| if is_in_kernel() { note(info) } else { previous(info) }));
    });
}

fn note(info: &PanicHookInfo<'_>) {
    let message = text_of(info.payload());
    // Locations are constants of the program, which the hook's borrow does not say.
    let location = info.location().map_or_else(|| Location::caller() as Site, |location| keep(location));
    with(|machine| {
        if !machine.inert {
            machine.raise(location, FaultKind::Panic { message });
        }
    });
}

/// What a panic was called with.
pub(crate) fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(not a text)").to_owned()
}

fn keep(location: &Location<'_>) -> Site {
    // SAFETY: every `Location` comes from `Location::caller`, which gives `&'static Location<'static>`.
    unsafe { &*std::ptr::from_ref(location).cast::<Location<'static>>() }
}
