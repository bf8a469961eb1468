//! What sessions came to, as one page that needs nothing else: summary, matrix, faults and timelines of failures.

use crate::summary::Summary;
use serde_json::Value;
use twox_hash::XxHash3_128;

/// The page without its parts, in the order in which they stand in it.
const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// What stands in for the mark of the scripts and styles that are the page's own.
const NONCE: &str = "{nonce}";
/// The largest number up to which JavaScript's have every digit.
const LARGEST_EXACT: u64 = (1 << 53) - 1;

/// Gives the page. The same summaries give the same page.
///
/// Names, errors and what guests said go into it as data: the page's script puts them into the document as text, and the
/// page allows no other script, no style but its own, and no connection.
///
/// # Errors
/// Those of the writer of its data.
pub fn page(summaries: &[Summary]) -> Result<String, serde_json::Error> {
    let mut data = serde_json::to_value(summaries)?;
    spell_large_numbers(&mut data);
    let data = embeddable(&data.to_string());
    // Nothing within the data can name a hash of the data.
    let nonce = format!("{:032x}", XxHash3_128::oneshot(data.as_bytes()));
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + SCRIPT.len() + data.len());
    let mut rest = PAGE;
    for (place, part) in [("{style}", STYLE), ("{data}", &data), ("{script}", SCRIPT)] {
        let (before, after) = rest.split_once(place).unwrap_or((rest, ""));
        page += &before.replace(NONCE, &nonce);
        page += part;
        rest = after;
    }
    page += rest;
    Ok(page)
}

/// Turns numbers that JavaScript's cannot hold, as seeds and ids of VMs are, into texts.
fn spell_large_numbers(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(large) = number.as_u64().filter(|number| *number > LARGEST_EXACT) {
                *value = Value::String(format!("{large:#x}"));
            }
        }
        Value::Array(values) => values.iter_mut().for_each(spell_large_numbers),
        Value::Object(entries) => entries.values_mut().for_each(spell_large_numbers),
        _ => {}
    }
}

/// Writes JSON so that nothing in it can end the element that it stands in.
fn embeddable(json: &str) -> String {
    // Outside of its strings JSON has none of these.
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn data_comes_back_and_ends_no_element(text in "(<|/|script|>|!--|]]|&|\\{data\\}|\\PC){0,20}") {
            let json = embeddable(&serde_json::to_string(&text).unwrap());
            prop_assert!(!json.contains(['<', '>', '&']));
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }

    #[test]
    fn the_page_is_whole() {
        let page = page(&[]).unwrap();
        assert!(page.ends_with("</html>\n"));
        for place in ["{style}", "{data}", "{script}", NONCE] {
            assert_eq!(page.matches(place).count(), 0, "{place}");
            let times = PAGE.matches(place).count();
            assert!(times == 1 || (place == NONCE && times > 1), "{place}");
        }
        // No address to fetch anything from, but for the name of the drawings' language.
        let addresses = page.matches("://").count();
        assert_eq!(addresses, page.matches("http://www.w3.org/2000/svg").count());
    }
}
