//! The server as its clients meet it, on the CPU.

#![cfg(feature = "serve")]

mod command;
mod fake;
mod http;
mod limits;
mod load;
mod openai;
mod prefixes;
mod pressure;
mod protocol;
mod replicas;
mod server;
mod storms;
