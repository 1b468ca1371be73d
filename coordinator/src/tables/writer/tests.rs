use super::super::journal;
use super::*;

const BOUNDS: Bounds = Bounds {
    segment_bytes_max: 1 << 20,
    bytes_max: 1 << 30,
    days_max: 10_000,
};

fn row(user: &str, output_tokens: u64) -> Row {
    Row::Usage(Box::new(UsageRow {
        time_ms: now_ms(),
        user: user.into(),
        endpoint: "e".into(),
        outcome: "complete".into(),
        output_tokens,
        ..UsageRow::default()
    }))
}

fn rows(writer: &Writer) -> usize {
    let (folder, segments) = writer.segments("").unwrap();
    let mut rows = 0;
    journal::read(&folder, &segments, None, |_, _| {
        rows += 1;
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    rows
}

fn tokens(writer: &Writer) -> u64 {
    let totals = writer.totals(None, None).unwrap();
    totals.iter().map(|total| total.sums.output_tokens).sum()
}

#[test]
fn rows_and_totals_are_there_as_soon_as_they_are_asked_for_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Writer::start(Kind::Usage, folder.path().join("usage"), BOUNDS).unwrap();
    let writer = start();
    for i in 0..3000 {
        writer.offer(row("ann", i % 2));
    }
    assert_eq!((rows(&writer), tokens(&writer)), (3000, 1500));
    writer.close();
    writer.offer(row("bob", 7));
    assert_eq!(tokens(&writer), 1507);
    // Killed: no index has seen the last row.
    let writer = start();
    assert_eq!((rows(&writer), tokens(&writer)), (3001, 1507));
    assert_eq!(
        writer.totals(Some("bob".into()), None).unwrap()[0]
            .sums
            .calls,
        1
    );
    // Without an index everything is counted from the rows.
    std::fs::remove_file(folder.path().join("usage/index.json")).unwrap();
    assert_eq!(tokens(&start()), 1507);
    std::fs::write(folder.path().join("usage/index.json"), "{torn").unwrap();
    assert_eq!(tokens(&start()), 1507);
}

#[test]
fn totals_outlive_the_segments_they_were_summed_from() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        segment_bytes_max: 4 << 10,
        bytes_max: 8 << 10,
        ..BOUNDS
    };
    let writer = Writer::start(Kind::Usage, folder.path().join("usage"), bounds).unwrap();
    for _ in 0..500 {
        writer.offer(row("ann", 1));
    }
    assert_eq!(tokens(&writer), 500);
    writer.close();
    let writer = Writer::start(Kind::Usage, folder.path().join("usage"), bounds).unwrap();
    writer.offer(row("ann", 1));
    assert_eq!(tokens(&writer), 501);
    assert!(rows(&writer) < 100, "old segments are dropped");
}

#[test]
fn a_disk_that_takes_nothing_costs_rows_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("usage");
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let shown = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        let mut desk = Desk::open(Kind::Usage, place.clone(), BOUNDS).unwrap();
        std::fs::write(&place, "a file where the folder goes").unwrap();
        desk.write(vec![row("ann", 1), row("ann", 1)]);
        assert!(desk.failing);
        std::fs::remove_file(&place).unwrap();
        desk.write(vec![row("ann", 5)]);
        assert!(!desk.failing);
        // What is not in the table is not in the totals.
        let totals = desk.tables[""].totals.get(None, None);
        assert_eq!((totals[0].sums.calls, totals[0].sums.output_tokens), (1, 5));
    });
    let text = shown.render();
    for line in [
        "tandem_table_rows_lost_total{table=\"usage\",reason=\"disk\"} 2",
        "tandem_table_rows_total{table=\"usage\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}
