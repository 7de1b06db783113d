#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // The library under test panics at some files, which SpinKV catches and makes errors of: such a panic must not end the fuzzer, as its hook would. One that
        // nobody catches still does.
        drop(std::panic::take_hook());
    },
    |data: &[u8]| spinkv_fuzz::tokenizer(data)
);
