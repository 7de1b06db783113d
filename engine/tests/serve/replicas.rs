//! deploy/kubernetes against the server that it runs: paths that exist, settings that are taken, times and memory that add up.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::http::get;
use crate::server::{Server, Setup};

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes")).join(name)
}

/// The documents of a YAML file.
fn yaml(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(file(name)).expect("the file is there");
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn settings() -> toml::Table {
    std::fs::read_to_string(file("serve.toml")).unwrap().parse().expect("TOML")
}

fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn probes_ask_what_the_server_answers() {
    let server = Server::start(Setup::default());
    let deployment = yaml("deployment.yaml").remove(0);
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let port = &container["ports"][0];
    assert_eq!(number(&port["containerPort"]), settings()["port"].as_integer().unwrap());
    for (probe, path) in
        [("startupProbe", "/health/ready"), ("readinessProbe", "/health/ready"), ("livenessProbe", "/health")]
    {
        let get_it = &container[probe]["httpGet"];
        assert_eq!((&get_it["path"], &get_it["port"]), (&Value::from(path), &port["name"]), "{probe}");
        assert_eq!(get(server.address, path).status, 200, "{probe}");
    }
    let annotations = &deployment["spec"]["template"]["metadata"]["annotations"];
    let monitor = &yaml("podmonitor.yaml")[0]["spec"]["podMetricsEndpoints"][0];
    assert_eq!(
        (&annotations["prometheus.io/path"], &monitor["path"]),
        (&Value::from("/metrics"), &Value::from("/metrics"))
    );
    assert_eq!(annotations["prometheus.io/port"], port["containerPort"].to_string());
    assert_eq!(monitor["port"], port["name"]);
    assert_eq!(get(server.address, "/metrics").status, 200);
}

#[test]
fn a_pod_has_the_time_and_the_memory_that_its_server_takes() {
    let pod = yaml("deployment.yaml").remove(0)["spec"]["template"]["spec"].clone();
    let (container, settings) = (&pod["containers"][0], settings());
    let drain = settings["drain-timeout"].as_integer().unwrap();
    let pause = number(&container["lifecycle"]["preStop"]["sleep"]["seconds"]);
    // The server waits twice 5 s more.
    assert!(number(&pod["terminationGracePeriodSeconds"]) >= pause + drain + 10);
    let memory = container["resources"]["limits"]["memory"].as_str().and_then(|text| text.strip_suffix("Gi"));
    let mib = memory.expect("GiB").parse::<i64>().unwrap() * 1024;
    assert!(mib >= settings["host-mib"].as_integer().unwrap() + 16 * 1024);
    assert!(settings["reserve-host-mib"].as_integer() <= settings["host-mib"].as_integer());
    assert_eq!(container["resources"]["requests"]["memory"], container["resources"]["limits"]["memory"]);
    assert_eq!(container["resources"]["limits"]["nvidia.com/gpu"], "1");
    let startup = &container["startupProbe"];
    assert!(number(&startup["periodSeconds"]) * number(&startup["failureThreshold"]) >= 600);
}

#[test]
fn everything_is_about_the_same_pods() {
    let label = |value: &Value| value["app.kubernetes.io/name"].as_str().map(str::to_owned);
    let ours = Some("spinkv".to_owned());
    let deployment = yaml("deployment.yaml").remove(0);
    assert_eq!(label(&deployment["spec"]["template"]["metadata"]["labels"]), ours);
    assert_eq!(label(&deployment["spec"]["selector"]["matchLabels"]), ours);
    for name in ["disruption.yaml", "podmonitor.yaml"] {
        assert_eq!(label(&yaml(name)[0]["spec"]["selector"]["matchLabels"]), ours, "{name}");
    }
    let services = yaml("service.yaml");
    assert!(services.iter().all(|service| label(&service["spec"]["selector"]) == ours));
    assert_eq!(services[0]["spec"]["sessionAffinity"], "ClientIP");
    assert_eq!(services[1]["spec"]["clusterIP"], "None", "a router needs the pods' own addresses");
    let list = yaml("kustomization.yaml").remove(0);
    for name in list["resources"].as_array().unwrap() {
        assert!(!yaml(name.as_str().unwrap()).is_empty());
    }
}

/// The settings are those of this version: the model alone is missing here.
#[test]
fn the_settings_are_taken() {
    let output = Command::new(assert_cmd::cargo::cargo_bin("spinkv"))
        .args(["serve", "--config"])
        .arg(file("serve.toml"))
        .env_clear()
        .output()
        .expect("the binary runs");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("/models/qwen3-14b") && !error.contains("serve.toml"), "{error}");
}
