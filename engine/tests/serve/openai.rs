//! The official Python client, where it is installed: `pip install openai`, and SPINKV_PYTHON if it is not python3's.

use std::process::Command;

use crate::protocol::chat_template;
use crate::server::{Server, Setup};

#[test]
fn the_official_client_is_content() {
    let python = std::env::var("SPINKV_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let installed = Command::new(&python).args(["-c", "import openai"]).output();
    if !installed.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: the_official_client_is_content, since {python} has no package openai");
        return;
    }
    let mut setup = Setup { template: Some(chat_template()), ..Setup::default() };
    setup.options.api_keys = vec!["key".to_owned()];
    let server = Server::start(setup);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/openai_client.py");
    let output = Command::new(&python)
        .args([script, &format!("http://{}", server.address), "key"])
        .env("NO_PROXY", "127.0.0.1")
        .output()
        .expect("python runs");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", said(&output.stdout), said(&output.stderr));
    println!("{}", said(&output.stdout));
}
