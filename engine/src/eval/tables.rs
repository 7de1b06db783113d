use std::fmt::{self, Write};

use super::{CellReport, Report, Task};

impl Report {
    /// The cells of a task, in groups of one method and budget, each over all contexts.
    fn lines(&self, task: Task) -> Vec<Vec<&CellReport>> {
        let mut lines: Vec<Vec<&CellReport>> = Vec::new();
        for cell in self.cells.iter().filter(|cell| cell.task == task) {
            let same =
                |line: &&mut Vec<&CellReport>| line[0].method == cell.method && line[0].budget == cell.budget;
            match lines.iter_mut().find(same) {
                Some(line) => line.push(cell),
                None => lines.push(vec![cell]),
            }
        }
        lines
    }

    /// A table in Markdown, aligned: methods and budgets down, contexts across.
    fn table(
        &self,
        text: &mut String,
        task: Task,
        title: &str,
        entry: impl Fn(&CellReport) -> Option<String>,
    ) {
        let lines = self.lines(task);
        let Some(first) = lines.first() else { return };
        let mut table = vec![vec!["method".to_owned(), "budget".to_owned()]];
        table[0].extend(first.iter().map(|cell| cell.context.to_string()));
        let mut any = false;
        for line in &lines {
            let mut row = vec![line[0].method.clone(), line[0].budget_name().to_owned()];
            for cell in line {
                let entry = entry(cell);
                any |= entry.is_some();
                row.push(entry.unwrap_or_else(|| "-".to_owned()));
            }
            table.push(row);
        }
        if !any {
            return;
        }
        let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..table[0].len()).map(width).collect();
        let _ = writeln!(text, "\n{title}\n");
        for (index, row) in table.iter().enumerate() {
            for (column, (entry, width)) in row.iter().zip(&widths).enumerate() {
                let _ = if column == 0 {
                    write!(text, "| {entry:<width$} ")
                } else {
                    write!(text, "| {entry:>width$} ")
                };
            }
            text.push_str("|\n");
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let _ = write!(text, "|{}{}", "-".repeat(width + 1), if column == 0 { "-" } else { ":" });
                }
                text.push_str("|\n");
            }
        }
    }
}

/// The tables.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!(
            "{}, {} backend: {} prompts a cell, seed {}; pages of {} tokens, {}, on the host {}; always read: {} sinks, {} newest\n",
            self.model,
            self.backend,
            self.prompts,
            self.seed,
            self.page_tokens,
            self.kv_dtype,
            self.host_kv,
            self.sinks,
            self.window
        );
        let number = |digits: usize| move |value: f64| format!("{value:.digits$}");
        let n = self.prompts;
        let exact = format!("needle: exact match of seven digits, n = {n} a cell");
        self.table(&mut text, Task::Needle, &exact, |cell| cell.exact_match.map(number(2)));
        let nats =
            format!("perplexity: nats a token, {} tokens after each of {n} prompts", self.scored_tokens);
        self.table(&mut text, Task::Perplexity, &nats, |cell| cell.nats.map(number(4)));
        let over = "perplexity: nats a token beyond dense attention (standard error over prompts)";
        self.table(&mut text, Task::Perplexity, over, |cell| {
            let error = cell.nats_over_dense_error.map_or(String::new(), |error| format!(" ({error:.4})"));
            cell.nats_over_dense.map(|over| format!("{over:+.4}{error}"))
        });
        let divergence = "perplexity: divergence from dense attention, nats a token";
        self.table(&mut text, Task::Perplexity, divergence, |cell| cell.divergence.map(number(4)));
        for task in [Task::Needle, Task::Perplexity] {
            let title = |what: &str| format!("{task}: {what}");
            let recall = title("share of the true attention mass that is read");
            self.table(&mut text, task, &recall, |cell| cell.recall.map(number(3)));
            let read = title("tokens that a KV head reads a step");
            self.table(&mut text, task, &read, |cell| cell.read_tokens.map(number(0)));
            let hits = title("hit ratio of selected pages, %");
            self.table(&mut text, task, &hits, |cell| cell.hit_ratio.map(|ratio| number(1)(100.0 * ratio)));
            let fetched = title("fetched from the host, KiB a token");
            self.table(&mut text, task, &fetched, |cell| {
                let any = cell.hit_ratio.is_some();
                any.then(|| number(0)(cell.fetched_bytes_per_token / 1024.0))
            });
        }
        f.write_str(&text)
    }
}
