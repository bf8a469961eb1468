//! The example of the README: `tests/quickstart.rs` is the same text, run as a test.
#![forbid(unsafe_code)]

#[cfg(test)]
mod tests {
    #[test]
    fn the_readme_shows_the_test() {
        let readme = include_str!("../../../README.md");
        let test = include_str!("../tests/quickstart.rs");
        // All but the line that documents the test program.
        let (_, example) = test.split_once("\n\n").expect("a heading");
        let shown = readme.contains(&format!("```rust\n{example}```\n"));
        assert!(shown, "README.md does not show tests/quickstart.rs");
        assert!(example.lines().count() <= 20, "{} lines", example.lines().count());
    }
}
