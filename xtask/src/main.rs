//! The project's own tasks, run as `cargo xtask`.

use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand};

/// Tasks of the SpinKV workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that a change must pass: format, lints, docs, tests. Needs no GPU; about 10 minutes on 2 cores from a
    /// fresh clone, 5 after that.
    Ci {
        /// Also run the tests that take minutes each (32K-token prompts).
        #[arg(long)]
        slow: bool,
    },
    /// Criterion benches of the pipeline's stages on the CPU. Results go to target/criterion.
    Bench {
        /// Only benches whose name holds this.
        filter: Option<String>,
    },
}

fn main() -> ExitCode {
    let steps = match Arguments::parse().task {
        Task::Ci { slow } => ci(slow),
        Task::Bench { filter } => {
            let mut arguments = vec!["bench".to_owned(), "--package".to_owned(), "spinkv-benches".to_owned()];
            arguments.extend(filter.into_iter().flat_map(|filter| ["--".to_owned(), filter]));
            vec![Step { name: "benches", arguments, environment: None }]
        }
    };
    for step in steps {
        if let Err(reason) = step.run() {
            eprintln!("xtask: {} failed: {reason}", step.name);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// One cargo call.
struct Step {
    name: &'static str,
    arguments: Vec<String>,
    environment: Option<(&'static str, &'static str)>,
}

impl Step {
    fn cargo(name: &'static str, arguments: &str) -> Self {
        Self { name, arguments: arguments.split_whitespace().map(str::to_owned).collect(), environment: None }
    }

    fn run(&self) -> Result<(), String> {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        eprintln!("xtask: {}: cargo {}", self.name, self.arguments.join(" "));
        let start = Instant::now();
        let status = Command::new(cargo).args(&self.arguments).envs(self.environment).status();
        match status {
            Ok(status) if status.success() => {
                eprintln!("xtask: {} passed in {:.0} s", self.name, start.elapsed().as_secs_f64());
                Ok(())
            }
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(format!("cargo did not start: {error}")),
        }
    }
}

fn ci(slow: bool) -> Vec<Step> {
    let mut steps = vec![
        Step::cargo("format", "fmt --all --check"),
        Step::cargo("lints", "clippy --workspace --all-targets --locked -- --deny warnings"),
        Step {
            environment: Some(("RUSTDOCFLAGS", "--deny warnings")),
            ..Step::cargo("docs", "doc --workspace --no-deps --document-private-items --locked")
        },
        Step::cargo("tests", "test --workspace --locked"),
    ];
    if slow {
        steps.push(Step::cargo("slow tests", "test --workspace --locked -- --ignored"));
    }
    steps
}
