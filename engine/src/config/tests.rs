use serde_json::json;

use super::*;

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models");

fn llama() -> Value {
    let text = fs::read_to_string(format!("{MODELS}/tiny-llama31-random/config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn open(config: &Value, generation: Option<Value>) -> Result<ModelConfig> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = generation {
        fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
    }
    ModelConfig::open(dir.path())
}

/// The Llama config with `changes` merged in; null removes a field.
fn with(changes: Value) -> Result<ModelConfig> {
    let mut config = llama();
    for (field, value) in changes.as_object().unwrap() {
        if value.is_null() {
            config.as_object_mut().unwrap().remove(field);
        } else {
            config[field] = value.clone();
        }
    }
    open(&config, None)
}

fn message(changes: Value) -> String {
    with(changes).unwrap_err().to_string()
}

#[test]
fn reads_the_qwen3_checkpoint() {
    let config = ModelConfig::open(format!("{MODELS}/needle-tiny")).unwrap();
    assert_eq!(config.architecture, Architecture::Qwen3);
    assert!(config.has_qk_norm() && config.tie_word_embeddings);
    assert_eq!((config.layers, config.query_heads, config.kv_heads, config.head_dim), (4, 8, 2, 128));
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (4096, 256, 768));
    assert_eq!(config.rope, RopeConfig { theta: 1e6, scaling: None });
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 32768));
    assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![1], Some(0)));
}

#[test]
fn reads_the_llama_checkpoint() {
    let config = ModelConfig::open(format!("{MODELS}/tiny-llama31-random")).unwrap();
    assert_eq!(config.architecture, Architecture::Llama);
    assert!(!config.has_qk_norm() && !config.tie_word_embeddings);
    let scaling = RopeScaling::Llama3(Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    });
    assert_eq!(config.rope, RopeConfig { theta: 500_000.0, scaling: Some(scaling) });
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let old = open(&llama(), None).unwrap();
    let mut new = llama();
    let mut rope = new["rope_scaling"].take();
    rope["rope_theta"] = new["rope_theta"].take();
    new["rope_parameters"] = rope;
    assert_eq!(open(&new, None).unwrap(), old);
    let mut older = llama();
    older["rope_scaling"]["type"] = older["rope_scaling"]["rope_type"].take();
    assert_eq!(open(&older, None).unwrap(), old);
}

#[test]
fn rope_without_scaling() {
    let plain = |changes| with(changes).unwrap().rope;
    let none = |theta| RopeConfig { theta, scaling: None };
    assert_eq!(plain(json!({ "rope_scaling": null })), none(500_000.0));
    assert_eq!(plain(json!({ "rope_scaling": { "type": "default" } })), none(500_000.0));
    assert_eq!(plain(json!({ "rope_scaling": { "rope_type": "default" } })), none(500_000.0));
    let parameters = json!({ "rope_theta": 1000, "rope_type": "default" });
    assert_eq!(
        plain(json!({ "rope_scaling": null, "rope_theta": null, "rope_parameters": parameters })),
        none(1000.0)
    );
    assert_eq!(plain(json!({ "rope_scaling": null, "rope_theta": null })), none(10_000.0));
}

#[test]
fn other_rope_types_say_what_is_supported() {
    for kind in ["linear", "dynamic", "longrope"] {
        let text = message(json!({ "rope_scaling": { "rope_type": kind, "factor": 4.0 } }));
        let expected = format!("rope_type is \"{kind}\"; supported: default, llama3, yarn");
        assert!(text.contains(&expected), "{text}");
    }
}

/// What Qwen3's files say for 128K, with `changes` merged in; null removes a field.
fn yarn(changes: Value) -> Result<ModelConfig> {
    let mut scaling =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 });
    for (field, value) in changes.as_object().unwrap() {
        scaling[field] = value.clone();
    }
    with(json!({ "rope_theta": 1e6, "max_position_embeddings": 40960, "rope_scaling": scaling }))
}

fn yarn_scaling(changes: Value) -> YarnScaling {
    match yarn(changes).unwrap().rope.scaling {
        Some(RopeScaling::Yarn(scaling)) => scaling,
        other => panic!("{other:?}"),
    }
}

#[test]
fn yarn_has_the_defaults_of_transformers() {
    let scaling = yarn_scaling(json!({}));
    let expected = YarnScaling {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: scaling.attention_factor,
        truncate: true,
    };
    assert_eq!(scaling, expected);
    assert!((scaling.attention_factor - 1.138629436111989).abs() < 1e-12, "0.1 ln 4 + 1");
    assert_eq!(yarn_scaling(json!({ "rope_type": null, "type": "yarn" })), expected);
    let without_original = yarn_scaling(json!({ "original_max_position_embeddings": null }));
    assert_eq!(without_original.original_max_position_embeddings, 40960);
    assert_eq!(yarn_scaling(json!({ "factor": 1 })).attention_factor, 1.0);
    let zeros = json!({ "beta_fast": 0, "beta_slow": 0, "mscale": 0, "mscale_all_dim": 0 });
    assert_eq!(yarn_scaling(zeros), expected);
}

#[test]
fn yarn_can_be_set_in_all_parts() {
    let parts = json!({
        "beta_fast": 64, "beta_slow": 2, "attention_factor": 1.5, "truncate": false, "mscale": 0.7, "mscale_all_dim": 1,
    });
    let expected = YarnScaling {
        factor: 4.0,
        original_max_position_embeddings: 32768,
        beta_fast: 64.0,
        beta_slow: 2.0,
        attention_factor: 1.5,
        truncate: false,
    };
    assert_eq!(yarn_scaling(parts), expected);
    let scales = yarn_scaling(json!({ "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0 }));
    assert!((scales.attention_factor - 0.9210423553163399).abs() < 1e-12, "{}", scales.attention_factor);
    let one = yarn_scaling(json!({ "mscale": 0.707 }));
    assert!((one.attention_factor - 1.138629436111989).abs() < 1e-12, "one alone counts for nothing");
}

#[test]
fn yarn_stretches_the_context() {
    let context = |changes| yarn(changes).unwrap().max_position_embeddings;
    assert_eq!(context(json!({})), 131_072, "files that ask for YaRN keep the unstretched number");
    assert_eq!(context(json!({ "factor": 1 })), 40_960);
    assert_eq!(context(json!({ "factor": 1e300 })), MAX_SIZE);
    let plain = with(json!({ "max_position_embeddings": 40960 })).unwrap();
    assert_eq!(plain.max_position_embeddings, 40_960, "llama3 scaling says its own");
}

#[test]
fn yarn_must_be_sound() {
    let text = |changes| yarn(changes).unwrap_err().to_string();
    for (changes, expected) in [
        (json!({ "factor": null }), "rope_scaling has rope_type \"yarn\" but no factor"),
        (json!({ "factor": 0.5 }), "factor is 0.5; supported: 1 or more"),
        (json!({ "factor": -1 }), "factor is -1; supported: finite numbers greater than 0"),
        (
            json!({ "original_max_position_embeddings": 0 }),
            "original_max_position_embeddings is 0; supported: 1 to",
        ),
        (json!({ "beta_fast": -1 }), "beta_fast is -1; supported: finite numbers greater than 0"),
        (json!({ "beta_slow": -1 }), "beta_slow is -1; supported: finite numbers greater than 0"),
        (json!({ "beta_slow": 32 }), "beta_slow is 32; must be less than beta_fast, 32"),
        (json!({ "mscale": -1 }), "mscale is -1; supported: finite numbers greater than 0"),
        (json!({ "attention_factor": 0 }), "attention_factor is 0; supported: finite numbers greater than 0"),
    ] {
        let text = text(changes);
        assert!(text.contains(expected), "{text} should contain {expected}");
    }
    let scaling = json!({ "rope_type": "yarn", "factor": 4 });
    let text = message(json!({ "rope_theta": 1, "rope_scaling": scaling }));
    assert!(text.contains("rope_theta is 1; supported: more than 1 with rope_type \"yarn\""), "{text}");
}

#[test]
fn llama3_scaling_must_be_complete_and_sound() {
    let scaled = |field: &str, value: Value| {
        let mut scaling = llama()["rope_scaling"].clone();
        scaling[field] = value;
        message(json!({ "rope_scaling": scaling }))
    };
    for field in ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"] {
        let text = scaled(field, Value::Null);
        assert!(text.ends_with(&format!("rope_scaling has rope_type \"llama3\" but no {field}")), "{text}");
        let text = scaled(field, json!(0));
        assert!(text.contains(&format!("{field} is 0; supported: finite numbers greater than 0")), "{text}");
    }
    assert!(scaled("factor", json!(0.5)).contains("factor is 0.5; supported: 1 or more"));
    assert!(scaled("low_freq_factor", json!(4.0)).contains("less than high_freq_factor, 4"));
    let text = message(json!({ "rope_scaling": { "factor": 8.0 } }));
    assert!(text.ends_with("rope_scaling has a factor but no rope_type"), "{text}");
}

#[test]
fn unsupported_settings_are_refused() {
    for (changes, expected) in [
        (json!({ "hidden_act": "gelu" }), "config.json: hidden_act is \"gelu\"; supported: silu"),
        (json!({ "attention_bias": true }), "attention_bias is true; supported: false"),
        (json!({ "mlp_bias": true }), "mlp_bias is true; supported: false"),
        (json!({ "use_sliding_window": true }), "use_sliding_window is true; supported: false"),
        (
            json!({ "layer_types": ["full_attention", "sliding_attention"] }),
            "\"sliding_attention\" for a layer",
        ),
        (json!({ "quantization_config": { "quant_method": "fp8" } }), "quantization_config is {"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor is 0.5; supported: 1"),
        (json!({ "head_dim": 127 }), "head_dim is 127; supported: even numbers"),
        (json!({ "num_key_value_heads": 3 }), "must be a multiple of num_key_value_heads, 3"),
        (json!({ "head_dim": null, "hidden_size": 250 }), "must be a multiple of num_attention_heads, 8"),
        (json!({ "eos_token_id": 4096 }), "must be less than vocab_size, 4096"),
        (
            json!({ "rms_norm_eps": -1e-5 }),
            "rms_norm_eps is -0.00001; supported: finite numbers greater than 0",
        ),
        (json!({ "rope_theta": 0 }), "rope_theta is 0"),
    ] {
        let text = message(changes);
        assert!(text.contains(expected), "{text} should contain {expected}");
    }
}

#[test]
fn sizes_have_limits() {
    for field in [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ] {
        for value in [0, MAX_SIZE + 1, usize::MAX] {
            let text = message(json!({ field: value }));
            assert!(text.contains(&format!("{field} is {value}; supported: 1 to 16777216")), "{text}");
        }
        assert!(matches!(with(json!({ field: -1 })), Err(Error::Json { .. })));
    }
}

#[test]
fn unknown_architectures_list_the_supported() {
    let suggestion = |name: &str| match with(json!({ "architectures": [name] })) {
        Err(Error::UnknownArchitecture { suggestion, found, .. }) => {
            assert_eq!(found, name);
            suggestion
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(suggestion("LLaMAForCausalLM"), Some("LlamaForCausalLM"));
    assert_eq!(suggestion("Qwen3ForCausalLm"), Some("Qwen3ForCausalLM"));
    assert_eq!(suggestion("Qwen2ForCausalLM"), None);
    assert_eq!(suggestion("Qwen3MoeForCausalLM"), None);
    assert_eq!(suggestion("GPT2LMHeadModel"), None);
    assert!(
        message(json!({ "architectures": null })).contains("supported: Qwen3ForCausalLM, LlamaForCausalLM")
    );
}

#[test]
fn defaults_for_fields_that_older_files_leave_out() {
    let config = with(json!({
        "head_dim": null, "num_key_value_heads": null, "tie_word_embeddings": null, "hidden_act": null,
        "attention_bias": null, "mlp_bias": null, "eos_token_id": null, "bos_token_id": null,
    }))
    .unwrap();
    assert_eq!((config.head_dim, config.kv_heads, config.tie_word_embeddings), (32, 8, false));
    assert_eq!((config.eos_token_ids, config.bos_token_id), (vec![], None));
}

#[test]
fn generation_config_decides_the_end_tokens() {
    let generation = |generation| open(&llama(), Some(generation)).unwrap().eos_token_ids;
    assert_eq!(generation(json!({ "eos_token_id": [5, 6] })), [5, 6]);
    assert_eq!(generation(json!({ "eos_token_id": 7 })), [7]);
    assert_eq!(generation(json!({ "eos_token_id": null })), [1]);
    assert_eq!(generation(json!({})), [1]);
    assert_eq!(with(json!({ "eos_token_id": [3, 4] })).unwrap().eos_token_ids, [3, 4]);
}

#[test]
fn bad_files_name_themselves() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(ModelConfig::open(dir.path()), Err(Error::Io { .. })));
    for text in ["", "{", "[]", "null", "{\"vocab_size\": \"many\"}", "\u{0}\u{1}"] {
        fs::write(dir.path().join("config.json"), text).unwrap();
        let error = ModelConfig::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{error:?}");
        assert!(error.to_string().contains("config.json"));
    }
    let error = with(json!({ "hidden_size": null })).unwrap_err();
    assert!(error.to_string().contains("missing field `hidden_size`"), "{error}");
}
