//! As much of an HTTP client as the tests need: what it sends is seen byte for byte, and it can be as rude as it likes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(found, _)| found.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// Checks that it is a refusal in OpenAI's form.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str, param: Option<&str>) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], code, "{body}");
        assert_eq!(error["param"], param.map_or(Value::Null, Value::from), "{body}");
        assert!(error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")), "{body}");
        assert_eq!(body.as_object().map(|fields| fields.len()), Some(1), "{body}");
        error["message"].as_str().expect("a message").to_owned()
    }
}

/// An answer that is read line by line.
pub struct Lines {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(240))).expect("a time limit");
    stream
}

fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    let mut stream = connect(address);
    // Who refuses a body need not read it.
    let _ = stream.write_all((head + "\r\n" + body).as_bytes());
    stream
}

/// Reads a head; the rest of the answer is left in the reader.
pub fn open(stream: TcpStream) -> Lines {
    let mut reader = BufReader::new(stream);
    let mut next = || {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line of the head");
        line.trim_end().to_owned()
    };
    let first = next();
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status line: {first:?}"));
    let mut headers = Vec::new();
    loop {
        let line = next();
        match line.split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => return Lines { status, headers, reader },
        }
    }
}

impl Lines {
    /// The rest of the answer, to the end of the connection.
    pub fn rest(mut self) -> Answer {
        let mut body = Vec::new();
        let chunked =
            self.headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        if chunked {
            while let Some(chunk) = self.chunk() {
                body.extend(chunk);
            }
        } else {
            self.reader.read_to_end(&mut body).expect("a body");
        }
        let body = String::from_utf8(body).expect("UTF-8");
        Answer { status: self.status, headers: self.headers, body }
    }

    /// What comes until the connection ends, in whatever way.
    pub fn until_it_ends(mut self) -> String {
        let mut all = Vec::new();
        let _ = self.reader.read_to_end(&mut all);
        String::from_utf8_lossy(&all).into_owned()
    }

    /// The next chunk of a chunked body.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut size = String::new();
        self.reader.read_line(&mut size).expect("a chunk's size");
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).ok()?;
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }
}

pub fn get(address: SocketAddr, path: &str) -> Answer {
    open(send(address, "GET", path, &[], "")).rest()
}

pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Answer {
    open(send(address, method, path, headers, body)).rest()
}

pub fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    request(address, "POST", path, &[], &body.to_string())
}

/// Sends a request and returns once the head of the answer is there.
pub fn begin(address: SocketAddr, path: &str, body: &Value) -> Lines {
    open(send(address, "POST", path, &[], &body.to_string()))
}

/// Sends a request and waits for nothing.
pub fn send_only(address: SocketAddr, path: &str, body: &Value) -> TcpStream {
    send(address, "POST", path, &[], &body.to_string())
}

/// The data of a stream's events, of which the last must be `[DONE]`.
#[track_caller]
pub fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, Some("text/event-stream")),
        "{answer:?}"
    );
    let mut data: Vec<&str> = answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{answer:?}");
    data.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
}
