//! `vmkit states`.

use crate::args::StatesFormat;
use crate::output::{Failure, Output, print_all};

pub fn print(format: StatesFormat, output: &Output) -> Result<u8, Failure> {
    let text = match format {
        _ if output.json => json()?,
        StatesFormat::Text => {
            let mut text = Vec::new();
            vmkit::print_states(&mut text).map_err(|error| vmkit::Error::io("the table cannot be printed", error))?;
            text
        }
        StatesFormat::Markdown => vmkit::states_markdown().into_bytes(),
        StatesFormat::Dot => vmkit::states_dot().into_bytes(),
        StatesFormat::Json => json()?,
    };
    print_all(&text).map(|()| 0)
}

fn json() -> Result<Vec<u8>, Failure> {
    let text = serde_json::to_vec_pretty(&vmkit::states_rows());
    let mut text = text.map_err(|error| vmkit::Error::io("the table cannot be written as JSON", error.into()))?;
    text.push(b'\n');
    Ok(text)
}
