//! What sessions came to, as one page that needs nothing else: summary, matrix, faults and timelines of failures.

use crate::summary::Summary;
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
    let data = embeddable(&with_large_numbers_spelled(&serde_json::to_string(summaries)?));
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
fn with_large_numbers_spelled(json: &str) -> String {
    let mut spelled = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find(|next: char| next == '"' || next.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        let (token, after) = from.split_at(if from.starts_with('"') {
            length_of_string(from)
        } else {
            let end =
                from.find(|next: char| !matches!(next, '0'..='9' | '.' | 'e' | 'E' | '+' | '-'));
            end.unwrap_or(from.len())
        });
        spelled += before;
        match token.parse::<u64>() {
            Ok(number) if number > LARGEST_EXACT => spelled += &format!("\"{number:#x}\""),
            _ => spelled += token,
        }
        rest = after;
    }
    spelled + rest
}

/// Gives how far the string reaches that `json` begins with.
fn length_of_string(json: &str) -> usize {
    let mut escaped = false;
    let end = json.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map_or(json.len(), |end| end + 2)
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

    proptest! {
        #[test]
        fn only_large_numbers_are_spelled(small in 0..=LARGEST_EXACT, large in LARGEST_EXACT + 1.., part: f64, text: String) {
            let wanted = serde_json::json!([small, [format!("{large:#x}"), part], { &text: text }, large.to_string()]);
            let given = serde_json::json!([small, [large, part], { &text: text }, large.to_string()]);
            let spelled = with_large_numbers_spelled(&given.to_string());
            prop_assert_eq!(spelled, wanted.to_string());
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
