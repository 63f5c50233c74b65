//! The rows of docs/compat.md.

/// Wishes (no MUSTs) that no test of this repository judges; their rows say
/// what does.
pub const UNTESTED: [&str; 2] = ["P42", "P43"];

/// A row: `| id | what must hold | where | test |`.
pub struct Row {
    pub id: String,
    pub what: String,
    pub places: Vec<String>,
    pub tests: Vec<String>,
}

/// All rows of all tables whose first cell is an id.
pub fn parse(text: &str) -> Vec<Row> {
    text.lines().filter_map(row).collect()
}

fn row(line: &str) -> Option<Row> {
    let cells: Vec<&str> = line
        .strip_prefix('|')?
        .strip_suffix('|')?
        .split('|')
        .collect();
    let [id, what, places, tests] = cells.as_slice() else {
        return None;
    };
    let id = id.trim();
    let number = id.strip_prefix(['M', 'E', 'P'])?;
    number.parse::<usize>().ok()?;
    Some(Row {
        id: id.to_owned(),
        what: what.trim().to_owned(),
        places: quoted(places),
        tests: quoted(tests),
    })
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    let parts = cell.split('`').skip(1).step_by(2);
    parts.map(str::to_owned).collect()
}
