//! tests/mutations.txt: for each id a text of the daemon's code and what takes
//! its place.

use crate::sources::{read, tracked};

/// One mutation.
#[derive(Debug)]
pub struct Mutation {
    pub id: String,
    /// Which of the row's tests shall fail, from 1.
    pub nth: usize,
    /// The beginning of the path of the file.
    pub place: String,
    pub old: String,
    pub new: String,
}

/// A block begins with `[id] place`, or with `[id/n] place` where it is for the
/// row's nth test; lines of the old text begin with `- `,
/// lines of the new one with `+ `.
pub fn parse(text: &str) -> Vec<Mutation> {
    let mut all: Vec<Mutation> = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some((id, place)) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "))
        {
            let (id, nth) = id.split_once('/').unwrap_or((id, "1"));
            all.push(Mutation {
                id: id.to_owned(),
                nth: nth.parse().expect("[id/n]"),
                place: place.to_owned(),
                old: String::new(),
                new: String::new(),
            });
            continue;
        }
        let last = all.last_mut().expect("a block begins with [id] place");
        let (into, rest) = match (line.strip_prefix("- "), line.strip_prefix("+ ")) {
            (Some(rest), _) => (&mut last.old, rest),
            (_, Some(rest)) => (&mut last.new, rest),
            _ => panic!("{line:?} is neither - nor +"),
        };
        if !into.is_empty() {
            into.push('\n');
        }
        into.push_str(rest);
    }
    all
}

impl Mutation {
    /// Why it does not apply.
    pub fn fault(&self) -> Option<String> {
        let Self {
            id,
            place,
            old,
            new,
            ..
        } = self;
        let files = tracked(place);
        let count: usize = files
            .iter()
            .map(|file| read(file).matches(old.as_str()).count())
            .sum();
        if old.is_empty() || old == new || count != 1 {
            return Some(format!("{id}: {count} times in {place}: {old}"));
        }
        None
    }
}
