//! Stacks of the least size, and stacks that the system refuses.

use cuda_std::emulator::{FaultKind, Launch};
use cuda_std::thread;

#[test]
fn the_smallest_stack_holds_a_kernel_and_its_panic() {
    let launch = Launch { stack_bytes: 16 << 10, ..Launch::new(2, 64) };
    // SAFETY: all threads of the block come to the barrier.
    let report = launch.run(|| unsafe { thread::sync_threads() }).unwrap();
    assert_eq!((report.threads, report.barriers), (128, 2));
    let fault = launch.run(|| panic!("{} of {:?}", 1.5, [2])).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Panic { message: "1.5 of [2]".to_owned() });
}

/// In a process of its own, whose address space a shell limits.
#[test]
#[cfg(target_os = "linux")]
fn a_refused_stack_is_a_fault_and_the_next_launch_runs() {
    use cuda_std::emulator::LaunchError;
    use std::io::ErrorKind;
    use std::process::Command;

    const NAME: &str = "a_refused_stack_is_a_fault_and_the_next_launch_runs";
    const LIMITED: &str = "CUDA_STD_TEST_LIMITED";
    if std::env::var_os(LIMITED).is_none() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -v 4194304 && exec \"$0\" \"$@\""]);
        shell.arg(std::env::current_exe().expect("a test binary has a path")).args([NAME, "--exact"]);
        assert!(shell.env(LIMITED, "4 GiB").status().expect("a shell").success());
        return;
    }
    let launch = Launch::new(1, 64);
    let huge = Launch { stack_bytes: 1 << 30, ..launch };
    for _ in 0..3 {
        // SAFETY: all threads of the block come to the barrier.
        let fault = huge.run(|| unsafe { thread::sync_threads() }).unwrap_err();
        let refused = LaunchError::StackRefused { bytes: 1 << 30, reason: ErrorKind::OutOfMemory };
        assert_eq!(fault.kind, FaultKind::Launch(refused));
        let message = "the system refused a thread's stack of 1073741824 bytes (out of memory): \
                       use smaller stacks or fewer resident blocks";
        assert!(fault.to_string().ends_with(message), "{fault}");
        // SAFETY: as above.
        let report = launch.run(|| unsafe { thread::sync_threads() }).unwrap();
        assert_eq!(report.threads, 64);
    }
}
