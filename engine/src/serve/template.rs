//! A checkpoint's chat template: messages to a prompt.

use std::fs;
use std::path::{Path, PathBuf};

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value as Json;

use crate::error::{Error, Result};

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// Who says it: system, user, assistant, …; what is known is the template's.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A chat template, as `transformers` keeps it beside a model: `chat_template.jinja`, or a field of `tokenizer_config.json`.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of the checkpoint in `dir`; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Json`] for files that cannot be read; [`Error::ChatTemplate`] for a template that is not valid.
    pub fn open(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let config_path = dir.as_ref().join("tokenizer_config.json");
        let config: Json = match fs::read(&config_path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(Error::json(&config_path))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Json::Null,
            Err(error) => return Err(Error::io(&config_path)(error)),
        };
        let path = dir.as_ref().join("chat_template.jinja");
        let (path, source) = match fs::read_to_string(&path) {
            Ok(source) => (path, source),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => match of_config(&config) {
                Some(source) => (config_path, source),
                None => return Ok(None),
            },
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let token = |name: &str| {
            let token = &config[name];
            // Added tokens are spelled out with their properties.
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        Self::new(path, source, token("bos_token"), token("eos_token")).map(Some)
    }

    /// A template from its source; `path` is where errors say that it stands.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] for one that is not valid.
    pub fn new(path: PathBuf, source: String, bos_token: String, eos_token: String) -> Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets Jinja up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        match environment.add_template_owned(NAME, source) {
            Ok(()) => Ok(Self { path, environment, bos_token, eos_token }),
            Err(error) => Err(Error::ChatTemplate { path, message: error.to_string() }),
        }
    }

    /// The prompt that asks for the answer to a conversation.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template refuses it, for instance for its order of roles.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        let template = self.environment.get_template(NAME).expect("the template was added");
        let rendered = template.render(context! {
            messages,
            add_generation_prompt => true,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        });
        rendered.map_err(|error| {
            let message = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Error::ChatTemplate { path: self.path.clone(), message }
        })
    }
}

/// The template in `tokenizer_config.json`: one, or a list of named ones of which "default" counts.
fn of_config(config: &Json) -> Option<String> {
    let field = &config["chat_template"];
    let named = || {
        let list = field.as_array()?;
        list.iter().find(|entry| entry["name"] == "default")?["template"].as_str()
    };
    field.as_str().or_else(named).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Qwen3's begins and ends.
    const CHATML: &str = "{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

    fn messages(all: &[(&str, &str)]) -> Vec<ChatMessage> {
        all.iter()
            .map(|(role, content)| ChatMessage { role: (*role).into(), content: (*content).into() })
            .collect()
    }

    fn template(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new("t.jinja".into(), source.to_owned(), "<s>".to_owned(), "</s>".to_owned())
    }

    #[test]
    fn a_conversation_becomes_a_prompt() {
        let all = messages(&[
            ("system", "Be brief."),
            ("user", " Hi "),
            ("assistant", "<think>x</think>\n\nHo"),
            ("user", "Bye"),
        ]);
        assert_eq!(
            template(CHATML).unwrap().render(&all).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
             <|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_template_may_refuse_and_is_named() {
        let source = "{{ bos_token }}{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}";
        let template = template(source).unwrap();
        assert_eq!(template.render(&messages(&[("user", "x")])).unwrap(), "<s>");
        let error = template.render(&messages(&[("assistant", "x")])).unwrap_err().to_string();
        assert!(error.contains("t.jinja") && error.contains("users begin"), "{error}");
        let error = self::template("{% if %}").unwrap_err().to_string();
        assert!(error.contains("t.jinja"), "{error}");
    }

    #[test]
    fn templates_are_found_in_both_places() {
        let dir = tempfile::TempDir::new().unwrap();
        let (at, user) = (dir.path(), messages(&[("user", "x")]));
        assert!(ChatTemplate::open(at).unwrap().is_none());
        let config = r#"{"bos_token": {"content": "<b>"}, "chat_template": [{"name": "tool", "template": "t"},
            {"name": "default", "template": "{{ bos_token }}d"}]}"#;
        fs::write(at.join("tokenizer_config.json"), config).unwrap();
        assert_eq!(ChatTemplate::open(at).unwrap().unwrap().render(&user).unwrap(), "<b>d");
        fs::write(at.join("chat_template.jinja"), "{{ bos_token }}file").unwrap();
        assert_eq!(ChatTemplate::open(at).unwrap().unwrap().render(&user).unwrap(), "<b>file");
        fs::write(at.join("tokenizer_config.json"), "{").unwrap();
        assert!(matches!(ChatTemplate::open(at), Err(Error::Json { .. })));
    }
}
