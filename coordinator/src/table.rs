//! Tables of text for people: columns as wide as their widest cell.

use std::fmt::{self, Write};

/// Writes rows of cells, each line indented by two spaces.
///
/// # Errors
/// When `text` takes no more.
pub fn write<const N: usize>(rows: &[[String; N]], text: &mut String) -> fmt::Result {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(text, "  {}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_have_no_tail() {
        let rows = [["a", "bcd", ""], ["ef", "g", "h"]].map(|row| row.map(str::to_owned));
        let mut text = String::new();
        write(&rows, &mut text).unwrap();
        assert_eq!(text, "  a   bcd\n  ef  g    h\n");
    }
}
