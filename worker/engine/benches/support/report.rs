//! What a kernel reached of the machine's limits.

/// Says a kernel's best rates and their shares of the peak and of the bandwidth, both in billions per second.
pub fn report(name: &str, seconds: f64, flops: u64, bytes: u64, (peak, read): (f64, f64)) {
    if seconds == f64::MAX {
        return;
    }
    let (gflops, gb_per_s) = (flops as f64 / seconds / 1e9, bytes as f64 / seconds / 1e9);
    println!(
        "{name}: {gflops:.1} GFLOP/s ({:.0} % of peak), {gb_per_s:.1} GB/s ({:.0} % of peak)\n",
        100.0 * gflops / peak,
        100.0 * gb_per_s / read
    );
}
