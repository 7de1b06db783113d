use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{Client, Exchange, Fault, LoadError, Plan, Session};
use crate::bench::Prompts;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// How long before its arrival a request's body is made, so that making it delays nothing.
const LEAD: Duration = Duration::from_secs(1);
/// Between the prompts of two turns of a session: no prompt is asked twice.
const TURN_STRIDE: usize = 1_000_003;

/// What requests say.
#[derive(Clone, Debug)]
pub struct Texts {
    prompts: Prompts,
    tokenizer: Option<Tokenizer>,
    as_text: bool,
}

impl Texts {
    /// Prompts as token ids, or as text if `as_text`.
    ///
    /// # Errors
    /// [`LoadError::NoTokenizer`] where there is none and text is wanted.
    pub fn new(
        prompts: Prompts,
        tokenizer: Option<Tokenizer>,
        as_text: bool,
    ) -> std::result::Result<Self, LoadError> {
        if as_text && tokenizer.is_none() {
            return Err(LoadError::NoTokenizer { what: "a prompt of text" });
        }
        Ok(Self { prompts, tokenizer, as_text })
    }

    /// Whether an answer can be part of the next prompt.
    ///
    /// # Errors
    /// [`LoadError::NoTokenizer`] where token ids of its text are needed.
    pub fn check_turns(&self, turns: usize) -> std::result::Result<(), LoadError> {
        if turns > 1 && !self.as_text && self.tokenizer.is_none() {
            return Err(LoadError::NoTokenizer { what: "an answer in the next prompt" });
        }
        Ok(())
    }

    /// The body of a request by itself, of prompt number `number`.
    ///
    /// # Errors
    /// What the tokenizer says of the prompt.
    pub fn body(&self, options: &RunOptions, number: usize, tokens: usize, output: usize) -> Result<String> {
        Ok(options.body(&self.question(number, 0, tokens)?, output))
    }

    /// What a session asks in a turn.
    fn question(&self, session: usize, turn: usize, tokens: usize) -> Result<Said> {
        let number = session.wrapping_add(turn.wrapping_mul(TURN_STRIDE));
        let ids = self.prompts.prompt(number, tokens);
        match &self.tokenizer {
            Some(tokenizer) if self.as_text => Ok(Said::Text(tokenizer.decode(&ids)?)),
            _ => Ok(Said::Ids(ids)),
        }
    }

    /// What was answered.
    fn answer(&self, text: String) -> Result<Said> {
        match &self.tokenizer {
            Some(tokenizer) if !self.as_text => Ok(Said::Ids(tokenizer.encode(&text)?)),
            _ => Ok(Said::Text(text)),
        }
    }
}

/// What a session has said so far.
#[derive(Clone, Debug)]
enum Said {
    Text(String),
    Ids(Vec<u32>),
}

impl Said {
    fn push(&mut self, more: Self) {
        match (self, more) {
            (Self::Text(text), Self::Text(more)) => text.push_str(&more),
            (Self::Ids(ids), Self::Ids(more)) => ids.extend(more),
            _ => unreachable!("all of a session is of one kind"),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Ids(ids) => json!(ids),
        }
    }
}

/// How requests are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// The model's name at the endpoint.
    pub model: String,
    /// Whether answers go on past the model's end tokens, so that they are as long as planned. Not every endpoint knows the field.
    pub ignore_eos: bool,
    /// How long a request may take.
    pub request_timeout: Option<Duration>,
    /// How long all of it may take: what is not over is cut off, what has not begun is not sent.
    pub time_limit: Option<Duration>,
    /// The number of the first session's prompt; another one, other prompts.
    pub first_prompt: usize,
}

impl RunOptions {
    fn body(&self, said: &Said, output: usize) -> String {
        let mut body = json!({"model": self.model, "prompt": said.json(), "max_tokens": output, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true}});
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body.to_string()
    }
}

/// What came of one request; times are seconds from the begin of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its session.
    pub session: usize,
    /// Its place there.
    pub turn: usize,
    /// When it should arrive: by the clock, or, of later turns, when the session has thought.
    pub scheduled: f64,
    /// When it was sent.
    pub sent: f64,
    /// When each chunk with text came.
    pub chunks: Vec<f64>,
    /// When its end was announced.
    pub finished: Option<f64>,
    /// When it was over, for whatever reason.
    pub end: f64,
    /// Tokens of the prompt: as the server counts them, else as planned.
    pub prompt_tokens: u64,
    /// Tokens of the answer, as the server counts them.
    pub usage: Option<u64>,
    /// Why it was not answered to its end.
    pub fault: Option<Fault>,
}

impl Record {
    /// From arrival to the first text, or to the end where no token has text.
    pub fn ttft(&self) -> Option<f64> {
        let finished = self.finished.filter(|_| self.fault.is_none());
        let first = self.chunks.first().copied().or(finished);
        first.map(|first| first - self.scheduled)
    }

    /// From the first text to the last.
    pub fn decoding(&self) -> Option<f64> {
        let first = *self.chunks.first()?;
        // Who was cut off was being served until then.
        let last = if self.fault.is_some() { Some(self.end) } else { self.chunks.last().copied() };
        last.map(|last| last - first)
    }

    /// Time for each token behind the first one.
    pub fn tpot(&self) -> Option<f64> {
        let tokens = self.output_tokens();
        (tokens > 1).then(|| Some(self.decoding()? / (tokens - 1) as f64))?
    }

    /// Tokens of the answer; chunks where the server did not say.
    pub fn output_tokens(&self) -> u64 {
        self.usage.unwrap_or(self.chunks.len() as u64)
    }
}

/// What the tasks share.
struct Shared {
    client: Client,
    texts: Arc<Texts>,
    options: RunOptions,
    start: Instant,
    think: Duration,
    records: UnboundedSender<Record>,
}

/// Lets a plan happen. Each session is a task, and none waits for another: a server that falls behind has as many requests to answer as one that does not.
///
/// # Errors
/// What the tokenizer says of a prompt that is made beforehand.
pub async fn run(
    client: &Client,
    plan: &Plan,
    texts: &Arc<Texts>,
    options: &RunOptions,
    heard: &mut dyn FnMut(&Record),
) -> Result<Vec<Record>> {
    // The clock begins when the first ones could be sent.
    let early = plan.sessions.iter().enumerate().take_while(|(_, session)| session.arrival <= LEAD);
    let early = early.map(|(number, session)| first(texts, options, number, session));
    let mut early = early.collect::<Result<Vec<_>>>()?.into_iter();
    let (records, mut results) = unbounded_channel();
    let shared = Arc::new(Shared {
        client: client.clone(),
        texts: Arc::clone(texts),
        options: options.clone(),
        start: Instant::now(),
        think: plan.think,
        records,
    });
    for (number, session) in plan.sessions.iter().enumerate() {
        tokio::spawn(converse(Arc::clone(&shared), number, session.clone(), early.next()));
    }
    drop(shared);
    let mut all = Vec::new();
    // Ends when the last task has dropped its sender.
    while let Some(record) = results.recv().await {
        heard(&record);
        all.push(record);
    }
    Ok(all)
}

fn first(texts: &Texts, options: &RunOptions, number: usize, session: &Session) -> Result<Said> {
    let tokens = session.turns.first().map_or(1, |turn| turn.question);
    texts.question(options.first_prompt.wrapping_add(number), 0, tokens)
}

/// One session, from its arrival to its last answer or first fault.
async fn converse(shared: Arc<Shared>, number: usize, session: Session, said: Option<Said>) {
    let Shared { texts, options, start, .. } = &*shared;
    let limit = options.time_limit.map(|limit| *start + limit);
    let mut scheduled = *start + session.arrival;
    if limit.is_some_and(|limit| scheduled >= limit) {
        return;
    }
    let mut said = match said {
        Some(said) => said,
        None => {
            sleep_until(scheduled.checked_sub(LEAD).unwrap_or(*start)).await;
            match first(texts, options, number, &session) {
                Ok(said) => said,
                Err(error) => return shared.unsaid(number, 0, scheduled, &error),
            }
        }
    };
    let mut planned = 0;
    for (place, turn) in session.turns.iter().enumerate() {
        planned += turn.question as u64;
        let body = options.body(&said, turn.output);
        sleep_until(scheduled).await;
        let sent = Instant::now();
        let of_request = options.request_timeout.map(|timeout| scheduled + timeout);
        let until = [limit, of_request].into_iter().flatten().min();
        let mut exchange = Exchange::default();
        let asked = shared.client.complete(body, &mut exchange);
        let fault = match until {
            None => asked.await.err(),
            Some(until) => match timeout_at(until, asked).await {
                Ok(outcome) => outcome.err(),
                Err(_) if Some(until) == limit => Some(Fault::CutOff),
                Err(_) => Some(Fault::Timeout),
            },
        };
        let end = Instant::now();
        let since = |time: Instant| time.saturating_duration_since(*start).as_secs_f64();
        let over = fault.is_some();
        let record = Record {
            session: number,
            turn: place,
            scheduled: since(scheduled),
            sent: since(sent),
            chunks: exchange.chunks.iter().copied().map(since).collect(),
            finished: exchange.finished.map(since),
            end: since(end),
            prompt_tokens: exchange.usage.map_or(planned, |usage| usage.0),
            usage: exchange.usage.map(|usage| usage.1),
            fault,
        };
        planned += record.output_tokens();
        // If nobody listens the run is over.
        let _ = shared.records.send(record);
        scheduled = end + shared.think;
        let Some(next) = session.turns.get(place + 1) else { return };
        if over || limit.is_some_and(|limit| scheduled >= limit) {
            return;
        }
        let number_of_prompt = options.first_prompt.wrapping_add(number);
        let more = texts
            .answer(std::mem::take(&mut exchange.text))
            .and_then(|answer| Ok((answer, texts.question(number_of_prompt, place + 1, next.question)?)));
        match more {
            Ok((answer, question)) => {
                said.push(answer);
                said.push(question);
            }
            Err(error) => return shared.unsaid(number, place + 1, scheduled, &error),
        }
    }
}

impl Shared {
    /// A request that could not be made.
    fn unsaid(&self, session: usize, turn: usize, scheduled: Instant, error: &crate::Error) {
        let at = scheduled.saturating_duration_since(self.start).as_secs_f64();
        let record = Record {
            session,
            turn,
            scheduled: at,
            sent: at,
            chunks: Vec::new(),
            finished: None,
            end: at,
            prompt_tokens: 0,
            usage: None,
            fault: Some(Fault::Unreadable(error.to_string())),
        };
        let _ = self.records.send(record);
    }
}
