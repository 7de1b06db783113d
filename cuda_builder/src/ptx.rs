//! A reader of PTX's structure: which functions there are, and which instructions they hold. It checks no syntax;
//! ptxas does.

use std::collections::BTreeMap;
use std::fmt;

/// What a module of PTX holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Of the instruction set: `8.0`.
    pub version: String,
    /// The architecture: `sm_90a`.
    pub target: String,
    /// The source files that `.loc` lines refer to.
    pub files: Vec<String>,
    /// Kernels and the functions that they call, in the file's order.
    pub functions: Vec<Function>,
}

/// A function with a body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Function {
    /// Its symbol.
    pub name: String,
    /// Whether the host can launch it.
    pub is_entry: bool,
    /// The line that its header starts on, from 1.
    pub first_line: usize,
    /// The line of its closing brace.
    pub last_line: usize,
    /// How often each opcode stands in it, with all modifiers: `ld.global.nc.b32`.
    pub opcodes: BTreeMap<String, u32>,
    /// Functions that it calls, once a call. Calls through pointers are in [`opcodes`](Self::opcodes) alone.
    pub calls: Vec<String>,
    /// Whether it has variables in local memory.
    pub has_local_variables: bool,
    /// How many `.loc` lines it has.
    pub locations: u32,
}

/// What an instruction does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Access {
    Load,
    Store,
    Atomic,
}

/// The memory that an instruction names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// None: the hardware looks at every address to find out, which is slower.
    Generic,
    /// Device memory.
    Global,
    /// Of a block or a cluster.
    Shared,
    /// Of a thread, in device memory.
    Local,
    /// Constant memory.
    Const,
    /// Arguments and results.
    Param,
}

/// Instructions that several threads execute together. One that the compiler moves, duplicates or drops hangs or
/// miscomputes, so their number is compared with the source's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collectives {
    /// `shfl`.
    pub shuffle: u32,
    /// `bar` and `barrier`, of a warp, a block or a cluster; arriving and waiting count one each.
    pub barrier: u32,
    /// `vote`.
    pub vote: u32,
    /// `match`.
    pub matching: u32,
    /// `redux`.
    pub reduce: u32,
    /// `mma`, `movmatrix`, `ldmatrix`.
    pub mma: u32,
    /// `wgmma`: products of a warpgroup, their fences, groups and waits.
    pub wgmma: u32,
}

impl Collectives {
    /// The kinds by name, in the order of the fields.
    pub fn by_kind(self) -> [(&'static str, u32); 7] {
        let Self { shuffle, barrier, vote, matching, reduce, mma, wgmma } = self;
        [
            ("shuffle", shuffle),
            ("barrier", barrier),
            ("vote", vote),
            ("matching", matching),
            ("reduce", reduce),
            ("mma", mma),
            ("wgmma", wgmma),
        ]
    }

    /// The count of a kind, or `None` if there is no kind of that name.
    pub fn of_kind(&mut self, name: &str) -> Option<&mut u32> {
        Some(match name {
            "shuffle" => &mut self.shuffle,
            "barrier" => &mut self.barrier,
            "vote" => &mut self.vote,
            "matching" => &mut self.matching,
            "reduce" => &mut self.reduce,
            "mma" => &mut self.mma,
            "wgmma" => &mut self.wgmma,
            _ => return None,
        })
    }

    fn add(&mut self, other: Self) {
        for (kind, count) in other.by_kind() {
            *self.of_kind(kind).expect("a kind of its own list") += count;
        }
    }
}

/// As `shuffle = 5, barrier = 1`, without those that are zero.
impl fmt::Display for Collectives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some = self.by_kind().into_iter().filter(|&(_, count)| count > 0);
        let some: Vec<String> = some.map(|(kind, count)| format!("{kind} = {count}")).collect();
        f.write_str(&some.join(", "))
    }
}

impl Function {
    /// How often each kind of memory is accessed in each way.
    pub fn accesses(&self) -> BTreeMap<(Access, Space), u32> {
        let mut accesses = BTreeMap::new();
        for (opcode, count) in &self.opcodes {
            if let Some(access) = access(opcode) {
                *accesses.entry(access).or_default() += count;
            }
        }
        accesses
    }

    /// The opcodes that access memory of `space`, with their counts.
    pub fn opcodes_of(&self, space: Space) -> impl Iterator<Item = (&str, u32)> {
        let opcodes = self.opcodes.iter().map(|(opcode, &count)| (opcode.as_str(), count));
        opcodes.filter(move |(opcode, _)| access(opcode).is_some_and(|(_, of)| of == space))
    }

    /// The collectives in this function alone.
    fn own_collectives(&self) -> Collectives {
        let mut counts = Collectives::default();
        for (opcode, count) in &self.opcodes {
            let kind = match opcode.split('.').next() {
                Some("shfl") => &mut counts.shuffle,
                Some("bar" | "barrier") => &mut counts.barrier,
                Some("vote") => &mut counts.vote,
                Some("match") => &mut counts.matching,
                Some("redux") => &mut counts.reduce,
                Some("mma" | "movmatrix" | "ldmatrix") => &mut counts.mma,
                Some("wgmma") => &mut counts.wgmma,
                _ => continue,
            };
            *kind += count;
        }
        counts
    }
}

/// What an opcode does to which memory, if anything.
fn access(opcode: &str) -> Option<(Access, Space)> {
    let mut parts = opcode.split('.');
    let access = match parts.next()? {
        "ld" | "ldu" | "ldmatrix" => Access::Load,
        "st" | "stmatrix" => Access::Store,
        "atom" | "red" => Access::Atomic,
        _ => return None,
    };
    // `shared::cluster` and `param::entry` are of the space before the colons.
    let space = parts.find_map(|part| match part.split("::").next()? {
        "global" => Some(Space::Global),
        "shared" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "const" => Some(Space::Const),
        "param" => Some(Space::Param),
        _ => None,
    });
    Some((access, space.unwrap_or(Space::Generic)))
}

impl Module {
    /// Reads PTX.
    pub fn parse(text: &str) -> Self {
        let mut reader = Reader::default();
        for (index, line) in without_comments(text).lines().enumerate() {
            reader.line(index + 1, line);
        }
        reader.module
    }

    /// The kernels, in the file's order.
    pub fn entries(&self) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(|function| function.is_entry)
    }

    /// The function that `line` (from 1) belongs to.
    pub fn function_at(&self, line: usize) -> Option<&Function> {
        self.functions.iter().find(|function| (function.first_line..=function.last_line).contains(&line))
    }

    /// The collectives that stand in `entry` and, for each of its calls, in the function called.
    pub fn collectives(&self, entry: &Function) -> Collectives {
        self.collectives_below(entry, &mut Vec::new())
    }

    fn collectives_below<'a>(&'a self, function: &'a Function, path: &mut Vec<&'a str>) -> Collectives {
        let mut sum = function.own_collectives();
        path.push(&function.name);
        for called in &function.calls {
            let called = self.functions.iter().find(|function| function.name == *called);
            // A function that calls itself is counted once.
            if let Some(called) = called.filter(|called| !path.contains(&called.name.as_str())) {
                sum.add(self.collectives_below(called, path));
            }
        }
        path.pop();
        sum
    }
}

/// What looks like a path from a machine's root in PTX, comments included, once each. The same PTX should come out of
/// every checkout.
pub fn absolute_paths(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let of_path = |c: char| c.is_alphanumeric() || "._-+@~/".contains(c);
    for (at, _) in text.match_indices('/') {
        let starts = !text[..at].ends_with(|c: char| of_path(c) || c == '*');
        let rest = &text[at + 1..];
        if starts && rest.starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '.') {
            let end = rest.find(|c| !of_path(c)).map_or(text.len(), |end| at + 1 + end);
            if !found.contains(&&text[at..end]) {
                found.push(&text[at..end]);
            }
        }
    }
    found
}

/// `text` with its comments blanked out; lines stay.
fn without_comments(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['/', '"']) {
        code.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.find("*/").map_or(rest.len(), |end| end + 4)
        } else if let Some(string) = rest.strip_prefix('"') {
            let length = string.find('"').map_or(rest.len(), |end| end + 2);
            code.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        } else {
            code.push('/');
            rest = &rest[1..];
            continue;
        };
        code.extend(rest[..length].chars().filter(|&c| c == '\n'));
        rest = &rest[length..];
    }
    code + rest
}

/// Reads a module line by line.
#[derive(Default)]
struct Reader {
    module: Module,
    /// The statement that is being read.
    statement: String,
    /// The line that it starts on.
    statement_line: usize,
    /// How many braces are open among the operands of the statement, as in `{%r1, %r2}`.
    operand_braces: u32,
    /// How many braces are open around the statement.
    depth: u32,
    /// The function that is being read.
    function: Option<Function>,
}

impl Reader {
    fn line(&mut self, number: usize, line: &str) {
        if self.statement.trim().is_empty() && self.directive(line.trim()) {
            return;
        }
        for c in line.chars() {
            if self.statement.trim().is_empty() {
                self.statement.clear();
                self.statement_line = number;
            }
            match c {
                '{' if self.opens_operand() => {
                    self.operand_braces += 1;
                    self.statement.push(c);
                }
                '}' if self.operand_braces > 0 => {
                    self.operand_braces -= 1;
                    self.statement.push(c);
                }
                ';' => {
                    self.statement();
                    self.statement.clear();
                }
                '{' => self.open(),
                '}' => self.close(number),
                // What stands before is a label: `$L__BB0_2:`, but not `shared::cta` or `?:`.
                ':' if is_label(&self.statement) => self.statement.clear(),
                c => self.statement.push(c),
            }
        }
        self.statement.push(' ');
    }

    /// Takes in a directive that ends with its line, not with a semicolon.
    fn directive(&mut self, line: &str) -> bool {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match name {
            ".version" => self.module.version = rest.trim().to_owned(),
            ".target" => self.module.target = rest.trim().to_owned(),
            ".file" => self.module.files.extend(rest.split('"').nth(1).map(str::to_owned)),
            ".loc" => {
                if let Some(function) = &mut self.function {
                    function.locations += 1;
                }
            }
            ".address_size" => {}
            _ => return false,
        }
        true
    }

    /// Whether a brace here belongs to the statement's operands and not to a block.
    fn opens_operand(&self) -> bool {
        let statement = self.statement.trim();
        !statement.is_empty() && !starts_block(statement)
    }

    fn open(&mut self) {
        let header = std::mem::take(&mut self.statement);
        if self.depth == 0
            && let Some((name, is_entry)) = function_header(&header)
        {
            let first_line = self.statement_line;
            self.function = Some(Function { name, is_entry, first_line, ..Function::default() });
        }
        self.depth += 1;
    }

    fn close(&mut self, line: usize) {
        self.statement.clear();
        self.depth = self.depth.saturating_sub(1);
        if self.depth == 0
            && let Some(mut function) = self.function.take()
        {
            function.last_line = line;
            self.module.functions.push(function);
        }
    }

    fn statement(&mut self) {
        let Some(function) = &mut self.function else { return };
        let statement = self.statement.trim();
        if statement.starts_with(".local") {
            function.has_local_variables = true;
        }
        if statement.starts_with('.') {
            return;
        }
        // `@%p1 bra $L` and `@!%p1 bra $L`.
        let instruction = match statement.strip_prefix('@') {
            Some(guarded) => {
                guarded.split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim_start())
            }
            None => statement,
        };
        let opcode = instruction.split(|c: char| c.is_whitespace() || c == '{').next().unwrap_or_default();
        if opcode.is_empty() {
            return;
        }
        *function.opcodes.entry(opcode.to_owned()).or_default() += 1;
        if opcode.split('.').next() == Some("call") {
            function.calls.extend(called(&instruction[opcode.len()..]));
        }
    }
}

/// Whether a brace after `statement` opens a block: a function's body or a section. Initialisers have braces too.
fn starts_block(statement: &str) -> bool {
    statement.starts_with(".section") || function_header(statement).is_some()
}

fn is_label(statement: &str) -> bool {
    let name = statement.trim();
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_$%".contains(c))
}

/// The name of the function whose header `text` is, and whether it is an entry.
fn function_header(text: &str) -> Option<(String, bool)> {
    let entry = after_word(text, ".entry").map(|rest| (rest, true));
    let (rest, is_entry) = entry.or_else(|| after_word(text, ".func").map(|rest| (rest, false)))?;
    // A function's result stands in parentheses before its name.
    let rest = match rest.trim_start().strip_prefix('(') {
        Some(result) => result.split_once(')')?.1,
        None => rest,
    };
    let name = rest.trim_start().split(|c: char| c.is_whitespace() || c == '(').next()?;
    (!name.is_empty()).then(|| (name.to_owned(), is_entry))
}

/// What follows `word` in a statement of directives.
fn after_word<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let text = text.trim_start();
    text.starts_with('.').then_some(())?;
    let (_, rest) = text.split_once(word)?;
    rest.starts_with([' ', '\t', '(']).then_some(rest)
}

/// The function that a call with these operands calls: `(retval), name, (arguments)`.
fn called(operands: &str) -> Option<String> {
    let rest = operands.trim_start();
    let rest = match rest.strip_prefix('(') {
        Some(result) => result.split_once(')')?.1.trim_start().strip_prefix(',')?.trim_start(),
        None => rest,
    };
    let name = rest.split([',', ' ', '\t']).next()?;
    (!name.is_empty() && !name.starts_with('%')).then(|| name.to_owned())
}

#[cfg(test)]
mod tests;
