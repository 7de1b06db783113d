//! The `spinkv` command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let result = match cli::Arguments::parse().command {
        cli::Command::Generate(arguments) => cli::generate::run(&arguments).map(|()| ExitCode::SUCCESS),
        cli::Command::Eval(arguments) => cli::eval::run(&arguments).map(|()| ExitCode::SUCCESS),
        cli::Command::Bench(arguments) => cli::bench::run(&arguments).map(|()| ExitCode::SUCCESS),
        #[cfg(feature = "serve")]
        cli::Command::Serve(arguments) => cli::serve::run(*arguments).map(|()| ExitCode::SUCCESS),
        cli::Command::Simulate(arguments) => cli::simulate::run(&arguments).map(|()| ExitCode::SUCCESS),
        cli::Command::Metadata(arguments) => cli::metadata::run(&arguments).map(|()| ExitCode::SUCCESS),
        cli::Command::Devices(arguments) => cli::devices::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            cli::say(&format!("spinkv: {error}\n"));
            ExitCode::from(2)
        }
    }
}
