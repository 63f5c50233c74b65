//! JSON whose keys keep their order, which serde_json's maps do not.

/// A text with its quotes.
pub fn text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// An object of keys and values, which are JSON already.
pub fn object(fields: &[(&str, String)]) -> String {
    let fields: Vec<String> = fields
        .iter()
        .map(|(key, value)| format!("{}:{value}", text(key)))
        .collect();
    format!("{{{}}}", fields.join(","))
}

/// A list, each row as `row` makes it.
pub fn list<T>(rows: &[T], row: impl Fn(&T) -> String) -> String {
    let rows: Vec<String> = rows.iter().map(row).collect();
    format!("[{}]", rows.join(","))
}
