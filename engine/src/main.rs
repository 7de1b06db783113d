//! The `spinkv` command.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let result = match cli::Arguments::parse().command {
        cli::Command::Generate(arguments) => cli::generate::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::say(&format!("spinkv: {error}\n"));
            ExitCode::from(2)
        }
    }
}
