//! `cargo run --profile fuzz -p lingrad-fuzz -- --seconds 60`: see the library of this crate.
//!
//! A child process computes and its parent watches, so that what aborts or hangs is told with its number too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lingrad_fuzz::{TARGETS, run};

/// What an input may take.
const LIMIT: Duration = Duration::from_secs(10);

const USAGE: &str = "options: --seconds S, --inputs N, --seed S, --start I, --only I";

struct Options {
    seconds: Option<f64>,
    inputs: u64,
    seed: u64,
    start: u64,
    only: Option<u64>,
    /// Where a child tells how far it is.
    state: Option<PathBuf>,
}

impl Options {
    fn read() -> Option<Self> {
        let mut options = Self { seconds: None, inputs: 0, seed: 0, start: 0, only: None, state: None };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next()?;
            match name.as_str() {
                "--seconds" => options.seconds = Some(value.parse().ok()?),
                "--inputs" => options.inputs = value.parse().ok()?,
                "--seed" => options.seed = value.parse().ok()?,
                "--start" => options.start = value.parse().ok()?,
                "--only" => options.only = Some(value.parse().ok()?),
                "--state" => options.state = Some(value.into()),
                _ => return None,
            }
        }
        if options.inputs == 0 {
            options.inputs = if options.seconds.is_some() { 1 << 60 } else { 100_000 };
        }
        Some(options)
    }
}

fn main() -> ExitCode {
    let Some(options) = Options::read() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    // SAFETY: there are no other threads yet. It holds for the children, and for an input alone as for them.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    if let Some(index) = options.only {
        let start = Instant::now();
        let (target, find) = run(options.seed, index, true);
        let found = find.is_some();
        let text = find.unwrap_or_else(|| "nothing found".into());
        println!("{}, {:.2} s: {text}", TARGETS[target].name, start.elapsed().as_secs_f64());
        return ExitCode::from(u8::from(found));
    }
    let done = match &options.state {
        Some(state) => work(&options, state).map(|()| false),
        None => supervise(&options),
    };
    match done {
        Ok(found) => ExitCode::from(u8::from(found)),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// The child: inputs one after the other. Its state is the number of the input under way and how many are done of each
/// target; a find is a line.
fn work(options: &Options, state: &Path) -> std::io::Result<()> {
    let mut state = File::create(state)?;
    let start = Instant::now();
    let mut counts = vec![0u64; TARGETS.len() + 1];
    let mut bytes = Vec::new();
    for index in options.start..options.start + options.inputs {
        if options.seconds.is_some_and(|seconds| start.elapsed().as_secs_f64() > seconds) {
            break;
        }
        counts[0] = index;
        bytes.clear();
        counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
        state.rewind()?;
        state.write_all(&bytes)?;
        let (target, find) = run(options.seed, index, false);
        counts[target + 1] += 1;
        if let Some(find) = find {
            println!("{index} {find}");
        }
    }
    counts[0] = u64::MAX;
    bytes.clear();
    counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
    state.rewind()?;
    state.write_all(&bytes)
}

/// The parent: children until all is done. Whether anything was found.
fn supervise(options: &Options) -> std::io::Result<bool> {
    let begun = Instant::now();
    let left = |seconds: f64| seconds - begun.elapsed().as_secs_f64();
    let (mut start, end) = (options.start, options.start + options.inputs);
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    let mut total = vec![0; TARGETS.len()];
    let mut killed = 0;
    let path = std::env::temp_dir().join(format!("lingrad-fuzz-{}", std::process::id()));
    let mut tell = |index: u64, find: &str| {
        // The target, and the place of a panic or what is wrong, without its numbers.
        let kind = find.split(": ").take(2).collect::<Vec<_>>().join(": ");
        let count = found.entry(kind).or_default();
        *count += 1;
        if *count == 1 {
            println!("FIND (--seed {} --only {index}) {find}", options.seed);
        }
    };
    while start < end && options.seconds.is_none_or(|seconds| left(seconds) > 0.0) {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--seed", &options.seed.to_string(), "--start", &start.to_string()]);
        command.args(["--inputs", &(end - start).to_string(), "--state"]).arg(&path);
        if let Some(seconds) = options.seconds {
            command.args(["--seconds", &left(seconds).to_string()]);
        }
        command.stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let output = child.stdout.take();
        let reader = thread::spawn(move || {
            let lines = output.into_iter().flat_map(|output| BufReader::new(output).lines());
            lines.map_while(Result::ok).collect::<Vec<_>>()
        });
        let (mut at, mut since, mut hung) = (start, Instant::now(), false);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            thread::sleep(Duration::from_millis(20));
            match state(&path).first() {
                Some(index) if *index != at => (at, since) = (*index, Instant::now()),
                _ if since.elapsed() > LIMIT => {
                    hung = true;
                    child.kill()?;
                }
                _ => {}
            }
        };
        for line in reader.join().unwrap_or_default() {
            if let Some((index, find)) = line.split_once(' ') {
                tell(index.parse().unwrap_or(0), find);
            }
        }
        let state = state(&path);
        total.iter_mut().zip(state.iter().skip(1)).for_each(|(total, count)| *total += count);
        match state.first() {
            Some(&u64::MAX) => break,
            Some(&index) => {
                tell(index, &if hung { format!("more than {LIMIT:?}") } else { format!("it ends with {status}") });
                killed += 1;
                start = index + 1;
            }
            None => return Err(std::io::Error::other(format!("the child ends with {status}"))),
        }
    }
    let _ = std::fs::remove_file(&path);
    for (target, total) in TARGETS.iter().zip(&total) {
        println!("{}: {total}", target.name);
    }
    for (kind, count) in &found {
        println!("{count} times: {kind}");
    }
    println!("{} inputs, seed {}, {} finds", total.iter().sum::<u64>() + killed, options.seed, found.len());
    Ok(!found.is_empty())
}

/// What the child has told last.
fn state(path: &Path) -> Vec<u64> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    match read {
        Ok(_) => bytes.as_chunks().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect(),
        Err(_) => Vec::new(),
    }
}
